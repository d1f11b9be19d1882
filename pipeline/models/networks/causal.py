"""Causal generator (GPT type): a language model continues the caption with image tokens.

Any `AutoModelForCausalLM` will do; its vocabulary grows by the image codebook and a few markers,
kept beside it as a table and a head of their own, so that what is new and what was pretrained can
be trained apart. `export` joins them into an ordinary Hugging Face model.

Sources: Ramesh et al. 2021, DALL-E (arXiv 2102.12092): caption, then image tokens, one
cross-entropy; Sun et al. 2024, LlamaGen (arXiv 2406.06525): guidance, top-k and top-p on image
tokens; Ho and Salimans 2022 (arXiv 2207.12598): classifier-free guidance.

A row reads  [padding] caption  style-marker  begin-marker  image tokens...  (see vocabulary.py);
models whose tasks give a source image read it, too, between caption and style, holes marked.
Shapes: B images, N image tokens, L caption tokens with padding on the left, D model width, V
codebook.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    LlamaConfig,
    PreTrainedModel,
)  # fmt: skip

from pipeline.config import GeneratorConfig
from pipeline.contracts import (
    GenerationRequest,
    ModelParts,
    ModelSpec,
    OnStep,
    PromptTokens,
    TokenCount,
)
from pipeline.errors import PretrainedNotFoundError, RecipeError
from pipeline.models.causal import CausalConfig
from pipeline.models.decoding import sampling
from pipeline.models.decoding.backend import DecoderFactory
from pipeline.models.decoding.language_model import positions_of
from pipeline.models.decoding.requests import resolve_requests
from pipeline.models.decoding.rows import initial_states
from pipeline.models.decoding.sequential import Prompts, SequentialDecoding
from pipeline.models.networks.vocabulary import ImageVocabulary
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.runtime import autocast, choose_device
from pipeline.tasks import gives_source
from pipeline.text.caption_readers import count_prompt

GUIDANCE_SCALE = 3.0
NO_TARGET = -100

Source = tuple[Tensor, Tensor]
"""Source images as image tokens int64 (B, N), and which of these are given, bool (B, N)."""


def language_model_config(config: GeneratorConfig, source: str | None) -> dict[str, Any]:
    """The Hugging Face config to build by: a pretrained model's, or of a small Llama on bytes.

    Raises:
        PretrainedNotFoundError: there is no such model, here or on the hub.
        RecipeError: it is of BERT type, whose states know the tokens that they shall predict.
    """
    if source is not None:
        try:
            pretrained = AutoConfig.from_pretrained(source)
        except (OSError, ValueError) as error:
            raise PretrainedNotFoundError(
                f"generator.causal.language_model={source}: {str(error).splitlines()[0]} "
                "Name a directory, a .gguf file or a hub id that can be reached"
            ) from error
        if type(pretrained) in MODEL_FOR_MASKED_LM_MAPPING:
            raise RecipeError(
                f"generator.causal.language_model={source} is of BERT type "
                f"({pretrained.model_type}), which reads both ways: take one of GPT type, or the "
                "family masked with it as caption_encoder.model"
            )
        found: dict[str, Any] = pretrained.to_dict()
        return found
    made: dict[str, Any] = LlamaConfig(
        vocab_size=len(ByT5Tokenizer()),
        hidden_size=config.width,
        intermediate_size=3 * config.width,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        attention_dropout=config.dropout,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
    ).to_dict()
    return made


class CausalTransformer(GeneratorNetwork):
    """A language model, a table of new tokens and a head over the image codebook."""

    text_head: Tensor | None

    def __init__(self, config: GeneratorConfig, spec: ModelSpec) -> None:
        super().__init__()
        if not spec.language_model:
            raise RecipeError("a causal model needs spec.language_model, a Hugging Face config")
        hf = AutoConfig.for_model(**spec.language_model)
        self.spec, self.no_style = spec, config.num_styles
        self.vocabulary = ImageVocabulary(
            hf.vocab_size, spec.codebook_size, config.num_styles, gives_source(config.tasks)
        )
        prompt = config.options(CausalConfig).max_prompt_tokens
        source = 1 + spec.num_tokens if self.vocabulary.with_source else 0
        needed = prompt + source + 2 + spec.num_tokens
        context = getattr(hf, "max_position_embeddings", needed)
        if context < needed:
            parts = f"{prompt} caption tokens, 2 markers and {spec.num_tokens} image tokens"
            if source:
                parts = f"{source} tokens of a source image, {parts}"
            raise RecipeError(
                f"generator.causal: {parts} do not fit the language model's context of {context}; "
                "lower max_prompt_tokens or take another model"
            )
        # two plain products on a CPU, for the reason in attention.py; None: the model's own choice
        attention = "eager" if choose_device().type == "cpu" else None
        whole = AutoModelForCausalLM.from_config(
            hf, dtype=torch.float32, attn_implementation=attention
        )
        self.lm: PreTrainedModel = whole.base_model
        tied = bool(getattr(hf, "tie_word_embeddings", False))
        self.register_buffer("text_head", None if tied else whole.lm_head.weight.detach().clone())
        width = self.text_table.embedding_dim
        self.image_table = nn.Embedding(self.vocabulary.num_new, width)
        self.image_head = nn.Linear(width, spec.codebook_size, bias=False)
        for weight in (self.image_table.weight, self.image_head.weight):
            nn.init.normal_(weight, std=0.02)

    def text_modules(self) -> list[nn.Module]:
        """What reads the caption: the policy `frozen` leaves the language model alone."""
        return [self.lm]

    def style_rows(self) -> Tensor:
        """The styles' vectors, one per row in the order of their ids."""
        first = self.vocabulary.style(0)
        return self.image_table.weight[first : first + self.no_style]

    def head_modules(self) -> list[nn.Module]:
        """What the policy `head` trains: the new tokens' table and head, and the last block."""
        return [self.image_table, self.image_head, self.layers()[-1]]

    def layers(self) -> nn.ModuleList:
        """The language model's blocks, by whatever name it has them."""
        return next(m for m in self.lm.modules() if isinstance(m, nn.ModuleList))

    @property
    def text_table(self) -> nn.Embedding:
        """The language model's own embeddings of text tokens."""
        table = self.lm.get_input_embeddings()
        assert isinstance(table, nn.Embedding), "of a causal language model"
        return table

    @torch.no_grad()
    def start_from_language_model(self, source: str) -> None:
        """Take a pretrained model's weights.

        The embeddings of new tokens start close to the mean of the text tokens'. The image head
        starts so small that all image tokens are about equally likely: one as large as the text
        head would begin with a loss of 25 nats in SmolLM2, whose states are large, instead of
        ln(codebook) = 8.4.
        """
        whole = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        self.lm.load_state_dict(whole.base_model.state_dict())
        if self.text_head is not None:
            self.text_head.copy_(whole.lm_head.weight)
        old = self.text_table.weight
        self.image_table.weight.normal_(std=0.2 * float(old.std())).add_(old.mean(0))
        self.image_head.weight.normal_(std=0.01 * float(old.std()))

    def prompt(
        self, ids: Tensor, mask: Tensor, style: Tensor, source: Source | None = None
    ) -> tuple[Tensor, Tensor]:
        """Everything before the image.

        Args:
            ids: int64 (B, L); mask: bool (B, L), padding on the left; all False: no caption.
            style: int64 (B,), `no_style` leaves it open.
            source: tokens int64 (B, N), meaningless where not given, and given bool (B, N); a row
                of which nothing is given has no source. For models that see sources alone.

        Returns:
            embeddings (B, L + 2, D) and mask bool (B, L + 2); 1 + N more with sources.
        """
        text = self.text_table(ids)
        begin = torch.full_like(style, self.vocabulary.begin)
        new = torch.stack([self.vocabulary.style(style), begin], 1)
        if source is not None:
            tokens, given = source
            holed = torch.where(given, tokens, self.vocabulary.hole)
            new = torch.cat([F.pad(holed, (1, 0), value=self.vocabulary.source), new], 1)
            seen = given.any(1, keepdim=True).expand(-1, 1 + given.shape[1])
            mask = torch.cat([mask, seen], 1)
        markers = self.image_table(new)
        return torch.cat([text, markers.to(text.dtype)], 1), F.pad(mask, (0, 2), value=True)

    def forward(
        self,
        image_tokens: Tensor,
        ids: Tensor,
        mask: Tensor,
        style: Tensor,
        source: Source | None = None,
        withheld: Tensor | None = None,
    ) -> Tensor:
        """int64 (B, N) and the prompt -> logits float (B, N, V), each from what is before it.

        Tokens of the image that are `withheld`, bool (B, N), are hidden from the later ones.
        """
        before, keys = self.prompt(ids, mask, style, source)
        if withheld is not None:
            image_tokens = image_tokens.masked_fill(withheld, self.vocabulary.begin)
        image = self.image_table(image_tokens[:, :-1]).to(before.dtype)
        keys = F.pad(keys, (0, image.shape[1]), value=True)
        states = self.lm(
            inputs_embeds=torch.cat([before, image], 1),
            attention_mask=keys.long(),
            position_ids=positions_of(keys),
            use_cache=False,
        ).last_hidden_state
        logits: Tensor = self.image_head(states[:, -image_tokens.shape[1] :]).float()
        return logits


class CausalObjective(Objective):
    """Cross-entropy over the image's tokens; captions and styles are dropped for guidance."""

    phases = ("predict",)
    model: CausalTransformer

    def __init__(self, model: CausalTransformer, config: GeneratorConfig) -> None:
        super().__init__()
        self.model, self.config = model, config

    def compilable(self) -> list[nn.Module]:
        return list(self.model.layers())

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss" in nats per token (label-smoothed while training) and "accuracy"."""
        config, model = self.config, self.model
        tokens, mask, style = batch["image_tokens"], batch["caption_mask"], batch["style"]
        withheld = None
        if self.training:
            mask, style = sampling.drop_conditions(
                mask, style, config=config, no_style=model.no_style
            )
            if share := config.options(CausalConfig).token_dropout:
                withheld = sampling.token_dropout(tokens, share)
        source, target = None, tokens.flatten()
        if "source_given" in batch:
            source = batch["source_tokens"], batch["source_given"]
            target = target.masked_fill(source[1].flatten(), NO_TARGET)  # nothing to learn there
        logits = model(tokens, batch["caption_ids"], mask, style, source, withheld).flatten(0, 1)
        smoothing = config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, target, ignore_index=NO_TARGET, label_smoothing=smoothing)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == target).sum() / (target != NO_TARGET).sum()
        return {"loss": loss, "accuracy": accuracy}


class CausalGenerator:
    """contracts.SteppedGenerator: guided sequential decoding of image tokens.

    Args:
        model: the network; later changes to it are not seen once an image is decoded.
        config: its section of the recipe.
        spec: its sizes.
        parts: the tokenizer, the caption tokenizer and the device.
    """

    def __init__(
        self, model: CausalTransformer, config: GeneratorConfig, spec: ModelSpec, parts: ModelParts
    ) -> None:
        self.model = model.to(parts.device).eval()
        self.config, self.spec, self.parts = config, spec, parts
        assert parts.caption_tokenizer is not None, "the causal family reads captions as token ids"
        self.read_ids = parts.caption_tokenizer
        self.styles, self.image_size = spec.styles, spec.image_size
        self.tasks = frozenset(config.tasks)
        self.make_decoder = DecoderFactory(self.model.lm, self.model.image_head)

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """See contracts.ImageGenerator.generate; a decoding step is an image token.

        Raises:
            RequestError: also for num_steps: it is the number of image tokens.
        """
        return self._decode(requests, on_step).images(range(len(requests)))

    def generate_tokens(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """The images' tokens, int64 (B, N)."""
        return self._decode(requests, None).tokens(range(len(requests)))

    def start(self, requests: Sequence[GenerationRequest]) -> SequentialDecoding:
        """See contracts.SteppedGenerator.start; more requests may join."""
        causal, sources = self.config.options(CausalConfig), self.model.vocabulary.with_source
        N = self.spec.num_tokens
        num_slots = causal.max_prompt_tokens + 2 + N + (1 + N if sources else 0)
        batch = SequentialDecoding(
            self.make_decoder(num_slots),
            self._begin,
            self.model.image_table,
            self.parts.tokenizer,
            partial(sampling.truncate_logits, top_k=causal.top_k, top_p=causal.top_p),
            self.parts.device,
            self.config.guidance_schedule,
        )
        batch.join(requests)
        return batch

    def count_prompt(self, prompt: str) -> PromptTokens:
        """See contracts.PromptCountingGenerator.count_prompt."""
        return count_prompt(self.read_ids, prompt)

    def count_tokens(self, request: GenerationRequest) -> TokenCount:
        """See contracts.SteppedGenerator.count_tokens."""
        text = int(self.read_ids([request.prompt, request.negative_prompt or ""])[1].sum())
        canvas = self.spec.num_tokens if request.canvas else 0
        return TokenCount(text=text, canvas=canvas, drawn=self.spec.num_tokens)

    def _decode(
        self, requests: Sequence[GenerationRequest], on_step: OnStep | None
    ) -> SequentialDecoding:
        batch = self.start(requests)
        while batch.step():
            if on_step is not None:
                on_step(*batch.progress(0))
        return batch

    def _begin(self, requests: Sequence[GenerationRequest]) -> Prompts:
        sees_source, device = self.model.vocabulary.with_source, self.parts.device
        resolved = resolve_requests(
            requests, self.config, self.styles, fixed_steps=self.spec.num_tokens,
            canvas_size=self.image_size if sees_source else None, guidance_scale=GUIDANCE_SCALE,
        )  # fmt: skip
        states = initial_states(resolved, self.parts.tokenizer, device)
        captions = [request.prompt for request in resolved]
        captions += [request.negative_prompt for request in resolved]
        ids, mask = (part.to(device) for part in self.read_ids(captions))
        style = torch.tensor([request.style_id for request in resolved], device=device).repeat(2)
        source = None
        if sees_source:
            tokens = torch.stack([state.tokens for state in states])
            given = ~torch.stack([state.canvas.hidden for state in states])
            source = tokens.repeat(2, 1), given.repeat(2, 1)
        with autocast(device):
            inputs, mask = self.model.prompt(ids, mask, style, source)
        return Prompts(states, inputs, mask)


@torch.no_grad()
def export(model: CausalTransformer, directory: Path) -> None:
    """Write an ordinary Hugging Face model that continues a prompt with image tokens.

    `AutoModelForCausalLM.from_pretrained(directory)` loads it; tessera.json says which ids are
    image tokens, markers and styles. Its head is untied: text keeps its own rows.
    """
    vocabulary, embedding = model.vocabulary, model.text_table.weight
    device = embedding.device
    settings = dict(model.spec.language_model)
    settings |= {"vocab_size": vocabulary.size, "tie_word_embeddings": False}
    whole = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.float32)
    whole.to(device)
    weights = model.lm.state_dict()
    name = next(n for n, p in model.lm.named_parameters() if p is embedding)
    weights[name] = torch.cat([embedding, model.image_table.weight])
    whole.base_model.load_state_dict(weights)
    text = embedding if model.text_head is None else model.text_head
    unused = vocabulary.num_new - vocabulary.codebook_size
    markers = torch.zeros(unused, embedding.shape[1], device=device)
    whole.lm_head.weight.copy_(torch.cat([text, model.image_head.weight, markers]))
    whole.save_pretrained(directory)
    layout = vocabulary.layout(model.spec.styles) | {"num_tokens": model.spec.num_tokens}
    (directory / "tessera.json").write_text(json.dumps(layout, indent=2, ensure_ascii=False))
