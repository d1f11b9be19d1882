"""Plain and optimised decoding against each other, and both against the papers' loops.

`maskgit` and `autoregressive` below are each family's whole algorithm on one screen: one image, no
batch, no cache, nothing joined or packed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline import registry
from pipeline.bundles.bundle import load_generator
from pipeline.contracts import Canvas, GenerationRequest
from pipeline.errors import RecipeError
from pipeline.models.decoding.backend import VARIABLE, chosen_backend
from pipeline.models.decoding.language_model import TransformersDecoder
from pipeline.models.decoding.llama import SlotDecoder
from pipeline.runtime import autocast, autocast_dtype

FAMILIES = registry.names("models")
STEPPED = ["masked", "causal"]
MASK = bytes(row < 24 for row in range(64) for _ in range(64))
CANVAS = Canvas(bytes(range(256)) * 48, MASK)
BFLOAT16_ROUNDING = 0.03
"""Of a prediction's root mean square: bfloat16 keeps 8 bits, 0.4 %, and layers add up."""

Load = Callable[[str, str], Any]


def requests(family: str) -> list[GenerationRequest]:
    found = [
        GenerationRequest("红苹果", seed=7, style="noto"),
        GenerationRequest("a dog", seed=8, guidance_scale=1.0),
        GenerationRequest("a red house", seed=9, guidance_scale=5.0, negative_prompt="night"),
        GenerationRequest("a boat", seed=10, temperature=0.0),
    ]
    return [*found, GenerationRequest("", seed=11, canvas=CANVAS)] if family == "masked" else found


@pytest.fixture
def load(
    tiny_bundles: Mapping[str, Path], pretrained_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Load:
    """(family, backend) -> its generator; random weights, enlarged so that captions matter."""

    def loaded(family: str, backend: str) -> Any:
        monkeypatch.setenv(VARIABLE, backend)
        made: Any = load_generator(
            tiny_bundles[family], pretrained_cache=pretrained_cache, device="cpu"
        )
        torch.manual_seed(1)
        for parameter in made.model.parameters():
            nn.init.normal_(parameter, std=0.15)
        made.generate([GenerationRequest("a cat")])  # the setting is read at the first image
        return made

    return loaded


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that does not multiply in bfloat16."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_both_backends_give_the_same_images(family: str, load: Load) -> None:
    asked = requests(family)
    reference, auto = (load(family, backend) for backend in ("reference", "auto"))
    if family in STEPPED:
        assert torch.equal(reference.generate_tokens(asked), auto.generate_tokens(asked))
    images = reference.generate(asked)
    assert torch.equal(images, auto.generate(asked))
    assert not torch.equal(images[0], images[1])


def predictions(family: str, generator: Any) -> list[Tensor]:
    """What the network says of the requests' first tokens, and a causal one of the next ones."""
    asked = requests(family)
    with torch.inference_mode():
        if family == "masked":
            batch = generator.start(asked)
            states = list(batch._states.values())
            tokens = torch.stack([state.tokens for state in states])
            known = torch.stack([state.known for state in states])
            with autocast(torch.device("cpu")):
                return [batch._guided_features(states, tokens, known, torch.ones(len(states)))]
        batch = generator.start(asked)
        first = batch._logits
        inputs = generator.model.image_table(torch.arange(len(first)))
        return [first, batch._decoder.step(inputs)]


@pytest.mark.skipif(
    autocast_dtype(torch.device("cpu")) is None, reason="this CPU does not multiply in bfloat16"
)
@pytest.mark.parametrize("family", STEPPED)
def test_in_bfloat16_both_backends_differ_by_its_rounding(family: str, load: Load) -> None:
    """A token that rounding chose otherwise changes all later ones: images are not compared."""
    both = [predictions(family, load(family, backend)) for backend in ("reference", "auto")]
    for reference, auto in zip(*both, strict=True):
        error = (auto - reference).square().mean().sqrt()
        assert error < BFLOAT16_ROUNDING * reference.square().mean().sqrt()


def test_in_bfloat16_a_gan_is_the_same(load: Load) -> None:
    asked = requests("gan")
    reference, auto = (load("gan", backend).generate(asked) for backend in ("reference", "auto"))
    assert torch.equal(reference, auto)


def test_the_setting_decides(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = load("causal", "reference").make_decoder(40)
    assert isinstance(decoder, TransformersDecoder)
    assert isinstance(load("causal", "auto").make_decoder(40), SlotDecoder)
    packed = load("masked", "auto")._predictor.features.func
    assert load("masked", "reference")._predictor.features.func is not packed
    monkeypatch.delenv(VARIABLE)
    assert chosen_backend() == "auto"
    monkeypatch.setenv(VARIABLE, "fats")
    with pytest.raises(RecipeError, match="TESSERA_DECODING='fats' is not one of: auto, reference"):
        chosen_backend()


def sample(logits: Tensor, rng: torch.Generator) -> Tensor:
    """(K, V) -> (K,): the token at which the cumulative probability passes a random number."""
    cumulative = logits.double().softmax(-1).cumsum(-1)
    return (torch.rand(len(logits), generator=rng)[:, None] > cumulative).sum(-1)


def maskgit(generator: Any, request: GenerationRequest, scale: float) -> Tensor:
    """Chang et al. 2022, sec. 3.2, with the guidance of Chang et al. 2023; int64 (N,)."""
    model, N, steps = generator.model, generator.spec.num_tokens, generator.config.num_steps
    states, mask = generator.read_captions([request.prompt, ""])
    conditioning = model.read(states, mask, torch.tensor([model.no_style] * 2))
    rng, table = torch.Generator().manual_seed(request.seed), model.table()
    tokens, hidden = torch.zeros(N, dtype=torch.long), torch.ones(N, dtype=torch.bool)
    for step in range(1, steps + 1):
        features = model(conditioning, tokens.repeat(2, 1), hidden.repeat(2, 1), table)
        conditional, unconditional = model.logits(features, table)[:, hidden]
        logits = unconditional + scale * (conditional - unconditional)
        sampled = sample(logits, rng)
        noise = -(-torch.rand(len(sampled), generator=rng).log()).log()
        log_p = logits.log_softmax(-1).gather(1, sampled[:, None])[:, 0]
        confidence = torch.full((N,), math.inf)
        confidence[hidden] = log_p + 4.5 * (1 - step / steps) * noise
        tokens[hidden] = sampled
        num_hidden = math.floor(math.cos(math.pi / 2 * step / steps) * N)
        hidden = torch.zeros_like(hidden)
        hidden[confidence.argsort()[:num_hidden]] = True
    return tokens


def autoregressive(generator: Any, request: GenerationRequest, scale: float) -> Tensor:
    """Next-token prediction with guidance (Sun et al. 2024), every step from the start; (N,)."""
    model, N = generator.model, generator.spec.num_tokens
    ids, mask = generator.read_ids([request.prompt, ""])
    style, rng = torch.tensor([model.no_style] * 2), torch.Generator().manual_seed(request.seed)
    tokens = torch.zeros(N, dtype=torch.long)
    for position in range(N):
        conditional, unconditional = model(tokens.repeat(2, 1), ids, mask, style)[:, position]
        logits = unconditional + scale * (conditional - unconditional)
        tokens[position] = sample(logits[None], rng)[0]
    return tokens


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize(("family", "algorithm"), [("masked", maskgit), ("causal", autoregressive)])
def test_decoding_is_the_papers_loop(
    family: str, algorithm: Callable[..., Tensor], backend: str, load: Load
) -> None:
    generator, request = load(family, backend), GenerationRequest("红苹果", seed=7)
    with torch.inference_mode():
        expected = algorithm(generator, request, scale=3.0)
    assert torch.equal(generator.generate_tokens([request])[0], expected)
