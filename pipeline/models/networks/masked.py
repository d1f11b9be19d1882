"""Masked generator (BERT type): a bidirectional transformer fills in hidden image tokens.

Sources: Chang et al. 2022, MaskGIT (arXiv 2202.04200): training masks and parallel decoding;
Chang et al. 2023, Muse (arXiv 2301.00704): text conditioning and guidance; Saharia et al. 2022,
Imagen (arXiv 2205.11487): caption states joined to the keys and values of self-attention; Chen et
al. 2023, PixArt-alpha (arXiv 2310.00426): one modulation shared by all blocks.

Shapes: B images, N image tokens, L caption tokens, C caption width, D model width, V codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.config import GeneratorConfig
from pipeline.contracts import (
    GenerationRequest,
    ModelParts,
    ModelSpec,
    OnStep,
    PromptTokens,
    TokenCount,
)
from pipeline.models.decoding import sampling
from pipeline.models.decoding.backend import token_predictor
from pipeline.models.decoding.parallel import (
    Conditioning,
    ParallelDecoding,
    ParallelState,
    TokenPredictor,
)
from pipeline.models.decoding.requests import ResolvedRequest, resolve_requests
from pipeline.models.decoding.rows import initial_states
from pipeline.models.networks.attention import attention
from pipeline.models.networks.levels import level_digits
from pipeline.objective import GeneratorNetwork, Objective
from pipeline.runtime import autocast
from pipeline.text.caption_encoder import masked_mean, standardise
from pipeline.text.caption_readers import CaptionReader, count_prompt

GUIDANCE_SCALE = 3.0

MAX_CONDITIONINGS = 256
"""How many conditionings, each of a caption and a style, are cached."""

ROWS = 512  # logits are computed for a multiple of this many tokens
NO_TARGET = -100


class TokenTable(nn.Module):
    """One vector per token: its own, plus one for the level of each of its FSQ dimensions.

    Neighbouring codes share their levels, so they start close together and learn from each other.
    """

    digits: Tensor | None

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        self.own = nn.Embedding(spec.codebook_size, width)
        nn.init.normal_(self.own.weight, std=0.02)
        digits = level_digits(spec)
        self.register_buffer("digits", digits, persistent=False)
        levels = [nn.Embedding(n, width) for n in spec.levels]
        for level in levels:
            nn.init.normal_(level.weight, std=0.02)
        self.levels = nn.ModuleList(levels)

    def forward(self) -> Tensor:
        """(V, D)."""
        table = self.own.weight
        for dimension, level in enumerate(self.levels):
            assert self.digits is not None
            table = table + level(self.digits[:, dimension])
        return table


class Block(nn.Module):
    """Attention to image and caption tokens, then an MLP; both modulated by the condition."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.caption_kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.expand = nn.Linear(width, 4 * width, bias=False)
        self.activation = nn.GELU(approximate="tanh")
        self.contract = nn.Linear(4 * width, width, bias=False)
        self.modulation = nn.Parameter(torch.zeros(6, width))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.contract.weight)

    def forward(self, x: Tensor, caption: Tensor, mask: Tensor, condition: Tensor) -> Tensor:
        """x (B, N, D), caption (B, L, D), mask bool (B, 1, 1, N + L), condition (B, 6, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            (condition + self.modulation).unsqueeze(2).unbind(1)
        )
        x = x + (1 + gate1) * self._drop(
            self._attend(_norm(x) * (1 + scale1) + shift1, caption, mask)
        )
        h = self.activation(self.expand(_norm(x) * (1 + scale2) + shift2))
        return x + (1 + gate2) * self._drop(self.contract(h))

    def _attend(self, x: Tensor, caption: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self._split(self.qkv(x), 3)
        caption_k, caption_v = self._split(self.caption_kv(caption), 2)
        k, v = torch.cat([k, caption_k], 2), torch.cat([v, caption_v], 2)
        mixed = attention(_norm(q), _norm(k), v, mask)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return attended

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        """(B, T, parts * D) -> parts of (B, heads, T, D / heads)."""
        B, T, _ = x.shape
        return x.view(B, T, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


class MaskedTransformer(GeneratorNetwork):
    """Image tokens with holes, a caption and a style -> features of all tokens, and `logits` of
    those that are asked for."""

    def __init__(self, config: GeneratorConfig, spec: ModelSpec) -> None:
        super().__init__()
        self.spec, width = spec, config.width
        self.no_style = config.num_styles
        self.table = TokenTable(spec, width)
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(spec.num_tokens, width) * 0.02)
        self.style = nn.Embedding(config.num_styles + 1, width)
        nn.init.normal_(self.style.weight, std=0.02)
        self.no_caption = nn.Parameter(torch.zeros(width))
        self.token_norm = nn.LayerNorm(spec.caption_width)
        self.pooled_norm = nn.LayerNorm(spec.caption_width)
        self.read_caption = nn.Linear(spec.caption_width, width)
        self.pool_caption = nn.Linear(spec.caption_width, width)
        layer = [
            nn.TransformerEncoderLayer(
                width,
                config.heads,
                2 * width,
                config.dropout,
                "gelu",
                batch_first=True,
                norm_first=True,
                bias=False,
            )
            for _ in range(config.caption_depth)
        ]
        self.caption_blocks = nn.ModuleList(layer)
        hidden, modulation = nn.Linear(width, width), nn.Linear(width, 6 * width)
        self.condition = nn.Sequential(hidden, nn.SiLU(), modulation)
        nn.init.zeros_(modulation.weight)
        self.blocks = nn.ModuleList(
            Block(width, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.to_table = nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros(spec.codebook_size))

    def text_modules(self) -> list[nn.Module]:
        """What reads the caption; the policy `frozen` leaves it alone."""
        return [
            self.token_norm, self.pooled_norm,
            self.read_caption, self.pool_caption, self.caption_blocks,
        ]  # fmt: skip

    def style_rows(self) -> Tensor:
        """The styles' vectors, one per row in the order of their ids."""
        return self.style.weight

    def head_modules(self) -> list[nn.Module]:
        """What the policy `head` trains: token table, styles, condition, output, last block."""
        return [self.table, self.style, self.condition, self.to_table, self.blocks[-1]]

    def standardise_captions(self, states: Tensor, mask: Tensor) -> None:
        """Start from these captions' statistics; states (B, L, C), mask bool (B, L)."""
        standardise(self.token_norm, states.float()[mask])
        standardise(self.pooled_norm, masked_mean(states.float(), mask))

    def read(self, states: Tensor, mask: Tensor, style: Tensor) -> Conditioning:
        """Read caption and style, once per image whatever the number of decoding steps.

        Args:
            states: (B, L, C); mask: bool (B, L), all False stands for no caption.
            style: int64 (B,), `no_style` leaves it open.

        Returns:
            caption (B, L, D), mask bool (B, 1, 1, N + L), condition (B, 6, D).
        """
        states = states.float()
        caption = self.read_caption(self.token_norm(states))
        given = mask.any(1, keepdim=True)
        if len(self.caption_blocks):
            padding = ~(mask | ~given)  # a row without a caption must not be all padding
            for block in self.caption_blocks:
                caption = block(caption, src_key_padding_mask=padding)
        pooled = self.pool_caption(self.pooled_norm(masked_mean(states, mask)))
        pooled = torch.where(given, pooled, self.no_caption.to(pooled.dtype))
        condition = self.condition(pooled + self.style(style))
        image_keys = mask.new_ones(len(mask), self.spec.num_tokens)
        keys = torch.cat([image_keys, mask], 1)[:, None, None, :]
        return caption, keys, condition.view(len(mask), 6, -1)

    def forward(
        self,
        reading: Conditioning,
        image_tokens: Tensor,
        hidden: Tensor,
        table: Tensor,
    ) -> Tensor:
        """`read`'s result, tokens int64 (B, N), hidden bool (B, N), `table()` -> (B, N, D)."""
        x = F.embedding(image_tokens, table)
        x = torch.where(hidden[:, :, None], self.hidden.to(x.dtype), x) + self.position
        for block in self.blocks:
            x = block(x, *reading)
        features: Tensor = self.to_table(_norm(x))
        return features

    def logits(self, features: Tensor, table: Tensor) -> Tensor:
        """features (..., D), table (V, D) -> float (..., V)."""
        return F.linear(features, table, self.bias).float()


class MaskedObjective(Objective):
    """Cross-entropy over hidden image tokens; captions and styles are dropped for guidance."""

    phases = ("predict",)
    model: MaskedTransformer

    def __init__(self, model: MaskedTransformer, config: GeneratorConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.grid_size = round(model.spec.num_tokens**0.5)

    def compilable(self) -> list[nn.Module]:
        return [*self.model.blocks, *self.model.caption_blocks]

    def losses(self, batch: Mapping[str, Tensor], phase: str) -> dict[str, Tensor]:
        """ "loss" in nats a token (label-smoothed while training) and "accuracy"."""
        config, model = self.config, self.model
        tokens, mask, style = batch["image_tokens"], batch["caption_mask"], batch["style"]
        if self.training:
            mask, style = sampling.drop_conditions(
                mask, style, config=config, no_style=model.no_style
            )
        hidden = sampling.random_masks(
            len(tokens),
            self.grid_size,
            rectangle_fraction=config.rectangle_fraction,
            device=tokens.device,
        )
        if "source_given" in batch:  # what is given is seen, and nothing to learn
            given = batch["source_given"]
            hidden = torch.where((hidden & ~given).any(1, keepdim=True), hidden, True) & ~given
            tokens = torch.where(given, batch["source_tokens"], tokens)
        reading = model.read(batch["caption_states"], mask, style)
        table = model.table()
        features = model(reading, tokens, hidden, table)
        rows, target = _rows_to_guess(tokens, hidden)
        logits = model.logits(features.flatten(0, 1)[rows], table)
        smoothing = config.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits, target, ignore_index=NO_TARGET, label_smoothing=smoothing)
        with torch.no_grad():
            accuracy = (logits.argmax(-1) == target).sum() / hidden.sum()
        return {"loss": loss, "accuracy": accuracy}


def _rows_to_guess(tokens: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the B * N features to turn into logits, and their targets: int64 (R,) both.

    R is a multiple of ROWS, filled up with rows whose target is NO_TARGET: kernels that are made
    and kept for every shape they meet (oneDNN's are) then meet few.
    """
    rows = hidden.flatten().nonzero()[:, 0]
    missing = -len(rows) % ROWS
    target = F.pad(tokens.flatten()[rows], (0, missing), value=NO_TARGET)
    return F.pad(rows, (0, missing)), target


class MaskedGenerator:
    """contracts.SteppedGenerator: parallel decoding with classifier-free guidance.

    Args:
        model: the network; do not change its weights once an image is decoded.
        config: its section of the recipe.
        spec: its sizes.
        parts: the tokenizer, the caption encoder and the device.
    """

    tasks = frozenset({"text_to_image", "completion"})

    def __init__(
        self, model: MaskedTransformer, config: GeneratorConfig, spec: ModelSpec, parts: ModelParts
    ) -> None:
        self.model = model.to(parts.device).eval()
        self.config, self.spec, self.parts = config, spec, parts
        self.read_captions = CaptionReader(parts.encoder)
        condition = partial(_condition_alone, self.model, self.read_captions, parts.device)
        self._condition = lru_cache(MAX_CONDITIONINGS)(condition)
        self.styles = spec.styles
        self.image_size = parts.tokenizer.image_size
        self.num_steps = config.num_steps

    def generate(
        self, requests: Sequence[GenerationRequest], *, on_step: OnStep | None = None
    ) -> Tensor:
        """See contracts.ImageGenerator.generate."""
        batch = self._decode(requests, on_step)
        return batch.images(range(len(requests)))

    def generate_tokens(self, requests: Sequence[GenerationRequest]) -> Tensor:
        """The images' tokens, int64 (B, N)."""
        return self._decode(requests, None).tokens(range(len(requests)))

    @torch.inference_mode()
    def start(self, requests: Sequence[GenerationRequest]) -> ParallelDecoding:
        """See contracts.SteppedGenerator.start; more requests may join."""
        batch = ParallelDecoding(
            self._begin,
            self._predictor,
            self.parts.tokenizer,
            self.parts.device,
            self.config.guidance_schedule,
        )
        batch.join(requests)
        return batch

    def count_prompt(self, prompt: str) -> PromptTokens:
        """See contracts.PromptCountingGenerator.count_prompt."""
        return count_prompt(self.read_captions.encoder, prompt)

    def count_tokens(self, request: GenerationRequest) -> TokenCount:
        """See contracts.SteppedGenerator.count_tokens."""
        captions = [request.prompt, request.negative_prompt or ""]
        text = int(self.read_captions(captions)[1].sum())
        canvas = self.spec.num_tokens if request.canvas else 0
        return TokenCount(text=text, canvas=canvas, drawn=self.spec.num_tokens)

    def _decode(
        self, requests: Sequence[GenerationRequest], on_step: OnStep | None
    ) -> ParallelDecoding:
        batch, rows = self.start(requests), range(len(requests))
        while batch.step():
            if on_step is not None:
                slowest = max(rows, key=lambda row: batch.progress(row)[1])
                on_step(*batch.progress(slowest))
        return batch

    @cached_property
    def _predictor(self) -> TokenPredictor:
        return token_predictor(self.model, self.parts.device, self.parts.encoder.max_tokens)

    def _begin(self, requests: Sequence[GenerationRequest]) -> list[ParallelState]:
        resolved = resolve_requests(
            requests,
            self.config,
            self.styles,
            guidance_scale=GUIDANCE_SCALE,
            canvas_size=self.image_size,
        )
        return [
            ParallelState(
                **vars(state),
                known=~state.canvas.hidden,
                conditioning=self._both_conditionings(state.request),
            )
            for state in initial_states(resolved, self.parts.tokenizer, self.parts.device)
        ]

    def _both_conditionings(self, request: ResolvedRequest) -> Conditioning:
        """Of the caption, and of what guidance leads away from: tensors (2, ...)."""
        with autocast(self.parts.device):
            pair = [
                self._condition(caption, request.style_id)
                for caption in (request.prompt, request.negative_prompt)
            ]
        return tuple(torch.cat(parts) for parts in zip(*pair, strict=True))


def _condition_alone(
    model: MaskedTransformer, read: CaptionReader, device: torch.device, caption: str, style_id: int
) -> Conditioning:
    """Of one caption, tensors (1, ...): beside others its last bits would be others."""
    states, mask = (part.to(device) for part in read([caption]))
    style = torch.tensor([style_id], device=device)
    return model.read(states, mask, style)
