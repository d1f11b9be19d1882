"""The causal family: parity with transformers, the cache, sampling, and pretrained beginnings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)  # fmt: skip

from pipeline.config import GeneratorConfig, TrainConfig
from pipeline.contracts import GenerationRequest, ModelParts, ModelSpec
from pipeline.errors import PretrainedNotFoundError, RecipeError
from pipeline.models.causal import CausalConfig
from pipeline.models.decoding import sampling
from pipeline.models.decoding.backend import DecoderFactory, has_adapters
from pipeline.models.decoding.cuda_graph import GraphBatch, GraphDecoder
from pipeline.models.decoding.language_model import TransformersDecoder
from pipeline.models.decoding.llama import LlamaWeights, SlotDecoder
from pipeline.models.networks import causal
from pipeline.models.networks.causal import CausalGenerator
from pipeline.models.networks.vocabulary import ImageVocabulary
from pipeline.text.caption_readers import HFCaptionTokenizer
from pipeline.training.policy import apply_policy, build_optimizers

CONFIG = GeneratorConfig(
    family="causal", width=32, depth=2, heads=2, dropout=0, num_styles=3,
    causal=CausalConfig(max_prompt_tokens=12),
)  # fmt: skip
SPEC = ModelSpec(
    image_size=32, codebook_size=40, num_tokens=16, levels=(), caption_width=8, styles=("a", "b"),
    language_model=causal.language_model_config(CONFIG, None),
)  # fmt: skip


class Flat:
    """Stands for a tokenizer: nothing here looks at pictures."""

    image_size, grid_size, codebook_size = 32, 4, 40
    levels: tuple[int, ...] = ()

    def decode(self, image_tokens: Tensor) -> Tensor:
        return torch.zeros(len(image_tokens), 3, 32, 32)


def model(spec: ModelSpec = SPEC) -> causal.CausalTransformer:
    torch.manual_seed(0)
    made = causal.CausalTransformer(CONFIG, spec)
    for parameter in made.parameters():  # away from near-equal logits
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    made.train(False)
    return made


def generator(made: causal.CausalTransformer, config: GeneratorConfig = CONFIG) -> CausalGenerator:
    ids = HFCaptionTokenizer(None, config.options(CausalConfig).max_prompt_tokens)
    parts = ModelParts(Flat(), None, torch.device("cpu"), ids)  # type: ignore[arg-type]
    return CausalGenerator(made, config, made.spec, parts)


def test_transformers_generates_the_same_tokens_from_the_export(tmp_path: Path) -> None:
    made = model()
    causal.export(made, tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    layout = json.loads((tmp_path / "tessera.json").read_text())
    prompts = ["红苹果", "a dog on"]
    ids, mask = HFCaptionTokenizer(None, 12)(prompts)
    markers = torch.tensor([[layout["style_markers"]["b"], layout["begin_marker"]]] * 2)
    first = layout["first_image_token"]
    others = [i for i in range(plain.config.vocab_size) if not first <= i < first + 40]
    theirs = plain.generate(
        torch.cat([ids, markers], 1),
        attention_mask=torch.cat([mask, torch.ones(2, 2, dtype=torch.bool)], 1).long(),
        max_new_tokens=16, min_new_tokens=16, do_sample=False, suppress_tokens=others,
    )[:, -16:] - first  # fmt: skip
    requests = [
        GenerationRequest(p, style="b", guidance_scale=1.0, temperature=0.0) for p in prompts
    ]
    assert torch.equal(generator(made).generate_tokens(requests), theirs)


def test_the_cache_changes_nothing() -> None:
    made = model()
    ids, mask = HFCaptionTokenizer(None, 12)(["house", "一座红色的房子"])
    style = torch.tensor([0, made.no_style])
    requests = [
        GenerationRequest("house", style="a", guidance_scale=1.0, temperature=0.0),
        GenerationRequest("一座红色的房子", guidance_scale=1.0, temperature=0.0),
    ]
    drawn = generator(made).generate_tokens(requests)
    with torch.inference_mode():
        assert torch.equal(made(drawn, ids, mask, style).argmax(-1), drawn)


def test_a_picture_sees_its_past_alone() -> None:
    made = model()
    ids, mask = HFCaptionTokenizer(None, 12)(["house"])
    tokens = torch.randint(40, (1, 16))
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % 40
    with torch.inference_mode():
        one, two = (made(t, ids, mask, torch.tensor([0])) for t in (tokens, other))
    torch.testing.assert_close(one[:, :10], two[:, :10])
    assert not torch.allclose(one[:, 10:], two[:, 10:])


def test_withheld_tokens_are_not_seen_by_later_ones() -> None:
    made = model()
    ids, mask = HFCaptionTokenizer(None, 12)(["house"])
    tokens, withheld = torch.randint(40, (1, 16)), torch.zeros(1, 16, dtype=torch.bool)
    withheld[:, 3] = True
    other = torch.where(withheld, (tokens + 1) % 40, tokens)
    with torch.inference_mode():
        whole, one, two = (
            made(t, ids, mask, torch.tensor([0]), withheld=w)
            for t, w in ((tokens, None), (tokens, withheld), (other, withheld))
        )
    assert torch.equal(one, two)
    torch.testing.assert_close(one[:, :4], whole[:, :4])
    assert not torch.allclose(one[:, 4:], whole[:, 4:])


def test_token_dropout_is_for_training_alone() -> None:
    made, wholly = model(), replace_causal(token_dropout=1.0)
    ids, mask = HFCaptionTokenizer(None, 12)(["house", "红苹果"])
    batch = {
        "image_tokens": torch.randint(40, (2, 16)), "caption_ids": ids, "caption_mask": mask,
        "style": torch.tensor([0, 1]),
    }  # fmt: skip

    def loss(config: GeneratorConfig, training: bool) -> float:
        torch.manual_seed(3)
        objective = causal.CausalObjective(made, config).train(training)
        return float(objective.losses(batch, "predict")["loss"].detach())

    assert loss(wholly, False) == loss(CONFIG, False)
    assert loss(wholly, True) != loss(CONFIG, True)


def test_truncated_logits() -> None:
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    kept = sampling.truncate_logits(logits, top_k=2, top_p=1.0).isfinite()
    assert kept.tolist() == [[True, True, False, False, False]]
    kept = sampling.truncate_logits(logits.flip(1), top_k=0, top_p=0.6).isfinite()
    assert kept.tolist() == [[False, False, False, True, True]]
    assert torch.equal(sampling.truncate_logits(logits, top_k=0, top_p=1.0), logits)
    level = torch.zeros(1, 5)
    assert sampling.truncate_logits(level, top_k=2, top_p=1.0).isfinite().sum() == 2, "ties are cut"
    certain = replace_causal(top_k=1)
    request = GenerationRequest("house", guidance_scale=1.0)
    drawn = [
        generator(model(), certain).generate_tokens([replace(request, seed=s)]).tolist()
        for s in (1, 2)
    ]
    assert drawn[0] == drawn[1], "of one token there is no choice"


def replace_causal(**changes: float) -> GeneratorConfig:
    options = CONFIG.options(CausalConfig).model_copy(update=changes)
    return CONFIG.model_copy(update={"causal": options})


def test_a_model_that_reads_both_ways_is_refused(tmp_path: Path) -> None:
    BertConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match=r"is of BERT type \(bert\).*GPT type"):
        causal.language_model_config(CONFIG, str(tmp_path))


def test_a_language_model_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(PretrainedNotFoundError, match=r"causal\.language_model=nobody/nothing: "):
        causal.language_model_config(CONFIG, "nobody/nothing")


@pytest.mark.parametrize("tied", [True, False])
def test_a_pretrained_language_model_gives_its_weights(tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    settings = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    pretrained = LlamaForCausalLM(settings)
    pretrained.save_pretrained(tmp_path / "lm")
    language_model = causal.language_model_config(CONFIG, str(tmp_path / "lm"))
    made = causal.CausalTransformer(CONFIG, replace(SPEC, language_model=language_model))
    made.start_from_language_model(str(tmp_path / "lm"))
    for name, weight in pretrained.model.state_dict().items():
        assert torch.equal(made.lm.state_dict()[name], weight), name
    causal.export(made, tmp_path / "out")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert torch.equal(whole.lm_head.weight[:50], pretrained.lm_head.weight)
    assert torch.equal(whole.lm_head.weight[50:90], made.image_head.weight)


def test_a_pretrained_language_model_begins_without_favourites(tmp_path: Path) -> None:
    torch.manual_seed(1)
    pretrained = LlamaForCausalLM(LlamaConfig(**dict(SPEC.language_model)))
    with torch.no_grad():  # as large as trained ones are
        pretrained.model.embed_tokens.weight.mul_(7)
        pretrained.model.norm.weight.mul_(2)
    pretrained.save_pretrained(tmp_path)
    made = causal.CausalTransformer(CONFIG, SPEC)
    made.start_from_language_model(str(tmp_path))
    ids, tokens = torch.tensor([[1, 2, 3]]), torch.arange(SPEC.num_tokens)[None]
    logits = made(tokens, ids, ids > 0, torch.tensor([0]))
    loss = torch.nn.functional.cross_entropy(logits[0], tokens[0]).item()
    assert abs(loss - math.log(SPEC.codebook_size)) < 0.1


def test_a_context_that_is_too_short_is_refused() -> None:
    short = dict(SPEC.language_model) | {"max_position_embeddings": 29}
    with pytest.raises(RecipeError, match="12 caption tokens, 2 markers and 16 image tokens"):
        causal.CausalTransformer(CONFIG, replace(SPEC, language_model=short))


def test_the_vocabulary_has_a_place_for_everything() -> None:
    vocabulary = ImageVocabulary(text_size=100, codebook_size=8, num_styles=3)
    new = [*range(8), vocabulary.begin, *(vocabulary.style(i) for i in range(4))]
    assert new == list(range(vocabulary.num_new)) and vocabulary.size == 113
    layout = vocabulary.layout(["a"])
    assert layout["style_markers"] == {"a": 109} and layout["no_style_marker"] == 112


def test_captions_are_padded_on_the_left_and_cut() -> None:
    ids, mask = HFCaptionTokenizer(None, 6)(["ab", "红苹果"])
    assert mask.tolist() == [[False] * 4 + [True] * 2, [True] * 6]
    assert ids[0, 4:].tolist() == [ord("a") + 3, ord("b") + 3], "ByT5 has three special tokens"


@pytest.mark.parametrize("bias", [True, False])
def test_slots_say_what_the_models_own_cache_says(bias: bool) -> None:
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, attention_bias=bias, mlp_bias=bias,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
    )  # fmt: skip
    lm, head = LlamaForCausalLM(config).model.eval(), torch.nn.Linear(32, 20)
    for parameter in lm.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    reference = TransformersDecoder(lm, head, torch.float32)
    slots = SlotDecoder(LlamaWeights(lm, head, torch.float32), num_slots=12)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]], dtype=torch.bool)
    inputs = torch.randn(3, 4, 32)
    with torch.inference_mode():
        torch.testing.assert_close(slots.prefill(inputs, mask), reference.prefill(inputs, mask))
        for step in range(4):
            inputs = torch.randn(len(reference.mask), 32)
            torch.testing.assert_close(slots.step(inputs), reference.step(inputs))
            if step == 1:
                for decoder in (reference, slots):
                    decoder.keep(torch.tensor([2, 0]))


class Replayed:
    """Stands for a CUDA graph, which needs a GPU (test_gpu.py has one)."""

    def __init__(self, batch: GraphBatch) -> None:
        self.batch = batch

    def replay(self) -> None:
        self.batch.logits = self.batch._step_all()


def test_rows_of_a_graph_batch_go_on_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphBatch, "_captured", lambda batch: Replayed(batch))
    lm = model().lm
    assert isinstance(lm, LlamaModel)
    weights = LlamaWeights(lm, nn.Linear(32, 50, bias=False), torch.float32)
    idle: list[GraphBatch] = []
    draws = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for _ in range(2):
            graph, plain, rows = GraphDecoder(weights, 9, idle), SlotDecoder(weights, 9), 0
            for joining, staying in ((3, 3), (0, 2), (1, 3), (4, 5), (0, 0)):
                if joining:  # into a free row, into a larger batch
                    inputs = torch.randn(joining, 4, 32, generator=draws)
                    mask = torch.arange(4) >= torch.arange(joining)[:, None] % 3
                    assert torch.equal(graph.prefill(inputs, mask), plain.prefill(inputs, mask))
                    rows += joining
                inputs = torch.randn(rows, 32, generator=draws)
                torch.testing.assert_close(graph.step(inputs), plain.step(inputs))
                for decoder in (graph, plain):
                    decoder.keep(torch.arange(rows)[:staying].flip(0))
                rows = staying
            assert sorted(map(len, idle)) == [3, 7], "left to those who come next"


def test_another_architecture_draws_through_its_own_cache() -> None:
    language_model = GPT2Config(
        vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=64
    ).to_dict()
    made = model(replace(SPEC, language_model=language_model))
    requests = [GenerationRequest(p, guidance_scale=1.0, temperature=0.0) for p in ("cat", "a dog")]
    batch = generator(made).start(requests)
    assert not batch.joinable
    drawn = generator(made).generate_tokens(requests)
    ids, mask = HFCaptionTokenizer(None, 12)(["cat", "a dog"])
    style = torch.full((2,), made.no_style)
    with torch.inference_mode():
        assert torch.equal(made(drawn, ids, mask, style).argmax(-1), drawn)


def test_adapters_are_drawn_with() -> None:
    made = model()
    assert isinstance(DecoderFactory(made.lm, made.image_head)(40), SlotDecoder)
    apply_policy(made, TrainConfig(policy="lora", lora_rank=2))
    assert has_adapters(made.lm)
    decoder = DecoderFactory(made.lm, made.image_head)(40)
    assert isinstance(decoder, TransformersDecoder), "weights are read past the adapters"


@pytest.mark.parametrize(("policy", "optimizer"), [("lora", "adamw"), ("full", "muon")])
def test_a_gpt2_is_trained_by_every_policy(policy: str, optimizer: str) -> None:
    language_model = GPT2Config(
        vocab_size=384, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    ).to_dict()
    made = model(replace(SPEC, language_model=language_model))
    config = TrainConfig(policy=policy, optimizer=optimizer)
    apply_policy(made, config)
    if policy == "lora":
        assert any("c_attn.lora_A" in name for name, _ in made.named_parameters())
    else:
        muon = build_optimizers(made, config)[0]
        assert sum(len(group["params"]) for group in muon.param_groups) >= 4
