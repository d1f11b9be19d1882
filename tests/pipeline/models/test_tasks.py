"""Tasks: what an example is, that both token families learn completion, that holes are filled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_causal import CONFIG as CAUSAL
from test_causal import SPEC as CAUSAL_SPEC
from test_models import CONFIG, SPEC, TOKEN_FAMILIES, toy_batch
from torch import Tensor, nn

from pipeline import registry
from pipeline.chain.shapes import check_generator
from pipeline.config import AugmentConfig, GeneratorConfig, TrainConfig
from pipeline.contracts import Canvas, GenerationRequest, ModelParts
from pipeline.errors import RecipeError, RequestError
from pipeline.models import load_family
from pipeline.models.causal import CausalConfig
from pipeline.models.networks import causal
from pipeline.models.networks.causal import CausalGenerator
from pipeline.objective import Objective
from pipeline.tasks import gives_source
from pipeline.text.caption_readers import HFCaptionTokenizer
from pipeline.training.feed import RowWeights
from pipeline.training.task_dataset import TaskDataset

BOTH = ("text_to_image", "completion")
TASKS = registry.names("tasks")
tasks = pytest.mark.parametrize("task", TASKS)
token_families = pytest.mark.parametrize("family", TOKEN_FAMILIES)


class Grids:
    """Eight pictures of 16 tokens."""

    weights: RowWeights | None = None

    def __len__(self) -> int:
        return 8

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        tokens = torch.arange(16).repeat(8, 1) + torch.arange(8)[:, None]
        return {"image_tokens": tokens[rows], "style": torch.zeros(len(rows), dtype=torch.long)}


@tasks
def test_an_example_gives_only_what_is_the_targets(task: str) -> None:
    module, tokens = registry.load("tasks", task), np.arange(64)
    seen = []
    for seed in range(200):
        made = module.example(tokens, np.random.default_rng(seed))
        assert made.source.shape == made.given.shape == made.target.shape == (64,)
        assert (made.source == made.target)[made.given].all()
        assert not made.given.all(), "there is always something to draw"
        again = module.example(tokens, np.random.default_rng(seed))
        assert (again.given == made.given).all()
        seen.append(made.given.mean())
    assert (max(seen) > 0) == module.SOURCE
    if module.SOURCE:
        assert min(seen) < 0.25 and max(seen) > 0.75 and 0.4 < np.mean(seen) < 0.6


def test_rows_become_examples_of_each_task_whatever_else_is_in_the_batch() -> None:
    dataset = TaskDataset(Grids(), BOTH)
    rows, draws = np.arange(8), np.random.default_rng(0).random((8, 2))
    batch = dataset.batch(rows, draws)
    with_source = batch["source_given"].any(1)
    assert with_source.any() and not with_source.all()
    alone = dataset.batch(rows[5:6], draws[5:6])
    assert torch.equal(alone["source_given"][0], batch["source_given"][5])
    assert torch.equal(dataset.batch(rows, None)["source_given"],
                       dataset.batch(rows, None)["source_given"])  # fmt: skip


def objective(family: str) -> Objective:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"tasks": BOTH})
    made, spec = load_family(family), SPEC
    spec = replace(spec, language_model=made.language_model_config(config, None))
    return made.objective(made.build(config, spec), config)


def with_holes(size: int = 8) -> dict[str, Tensor]:
    """Pictures that their captions say nothing about: two thirds are given, or nothing."""
    batch = toy_batch(size)
    batch["caption_mask"] = torch.zeros_like(batch["caption_mask"])
    batch["style"] = torch.zeros_like(batch["style"])
    given = torch.arange(16) % 3 != 0
    source = batch["image_tokens"]
    return batch | {"source_tokens": source, "source_given": given.repeat(size, 1)}


@pytest.mark.slow
@token_families
def test_the_source_tells_what_belongs_into_the_hole(family: str) -> None:
    """Only who reads the source can tell these pictures apart."""
    made, batch = objective(family), with_holes()
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3, weight_decay=0)
    for step in range(200):
        torch.manual_seed(step)
        loss = made.losses(batch, "predict")["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    nothing = batch | {"source_given": torch.zeros_like(batch["source_given"])}
    torch.manual_seed(0)
    with torch.no_grad():
        informed, blind = (made.losses(b, "predict")["loss"].item() for b in (batch, nothing))
    assert informed < 0.4 < 1 < blind, (informed, blind)


@token_families
def test_what_is_given_is_nothing_to_learn(family: str) -> None:
    made, batch = objective(family).eval(), with_holes()
    target = batch["image_tokens"].clone()
    target[batch["source_given"]] = 0  # only the source still says what they are
    source = {"image_tokens": target} if family == "masked" else {}
    with torch.no_grad():
        torch.manual_seed(1)
        before = made.losses(batch, "predict")["loss"]
        torch.manual_seed(1)
        assert torch.equal(made.losses(batch | source, "predict")["loss"], before)


class Striped:
    """Stands for a tokenizer: a picture's token is its cell's red value."""

    image_size, grid_size, codebook_size = 32, 4, 40
    levels: tuple[int, ...] = ()

    def encode(self, images: Tensor) -> Tensor:
        red = (images[:, 0] + 1) * 127.5
        return red[:, ::8, ::8].round().long().flatten(1)

    def decode(self, image_tokens: Tensor) -> Tensor:
        cells = image_tokens.view(-1, 1, 4, 4).float() / 127.5 - 1
        return cells.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)


def completing(config: GeneratorConfig) -> CausalGenerator:
    torch.manual_seed(0)
    made = causal.CausalTransformer(config, CAUSAL_SPEC)
    for parameter in made.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
    ids = HFCaptionTokenizer(None, config.options(CausalConfig).max_prompt_tokens)
    parts = ModelParts(Striped(), None, torch.device("cpu"), ids)  # type: ignore[arg-type]
    return CausalGenerator(made, config, CAUSAL_SPEC, parts)


def canvas(level: int) -> Canvas:
    mask = torch.zeros(32, 32, dtype=torch.uint8)
    mask[:16] = 1
    return Canvas(bytes([level]) * (32 * 32 * 3), mask.numpy().tobytes())


def test_a_causal_model_goes_on_from_a_canvas() -> None:
    generator = completing(CAUSAL.model_copy(update={"tasks": BOTH}))
    assert generator.tasks == {*BOTH}
    asked = [
        GenerationRequest("house", seed=1, canvas=canvas(7)),
        GenerationRequest("house", seed=1, canvas=canvas(30)),
        GenerationRequest("house", seed=1),
    ]
    tokens, images = generator.generate_tokens(asked), generator.generate(asked)
    assert (tokens[0, 8:] == 7).all() and (tokens[1, 8:] == 30).all(), "what is given stays"
    assert (images[0, :, 16:] == 7).all() and (images[1, :, 16:] == 30).all()
    assert not torch.equal(tokens[0, :8], tokens[1, :8]), "the hole's first tokens see the source"
    assert torch.equal(generator.generate_tokens(asked[:1])[0], tokens[0]), "whatever the batch"
    assert torch.equal(generator.generate_tokens(asked[2:])[0], tokens[2])


def test_a_causal_model_that_sees_no_source_refuses_a_canvas() -> None:
    generator = completing(CAUSAL)
    assert generator.tasks == {"text_to_image"}
    with pytest.raises(RequestError, match="cannot go on from a picture"):
        generator.generate([GenerationRequest("house", canvas=canvas(7))])


def test_tasks_that_cannot_be_learnt_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"'complete'; there are: completion.*Did you mean"):
        gives_source(["complete"])
    check_generator(GeneratorConfig(family="causal", tasks=BOTH))
    with pytest.raises(RecipeError, match="sees no source picture"):
        check_generator(GeneratorConfig(family="gan", tasks=BOTH))


def test_augmentation_is_refused_where_no_pixels_are_seen() -> None:
    train = TrainConfig(augment=AugmentConfig(flip=0.0, color=0.3))
    check_generator(GeneratorConfig(family="gan", train=train))
    mixed = TrainConfig(augment=AugmentConfig(flip=0.0, mixup=0.5))
    with pytest.raises(RecipeError, match="a mixture has no caption"):
        check_generator(GeneratorConfig(family="gan", train=mixed))
    for family in ("masked", "causal"):
        check_generator(GeneratorConfig(family=family))
        with pytest.raises(RecipeError, match="in the section `encode`"):
            check_generator(GeneratorConfig(family=family, train=train))
