"""What must not change by accident: the shipped base's images, and the keys of the recipes' steps.

    UPDATE_GOLDEN=1 pytest tests/pipeline/chain/test_golden.py    # after a change on purpose

A changed key makes every home do that step again. A changed default that no key knows of is worse:
old results would pass for new ones. Then raise the step's version in the table of steps.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.bundles.bundle import load_generator
from pipeline.chain.judging import contest, evaluation_step, gate_step
from pipeline.chain.plan import resolve
from pipeline.chain.table import training_steps
from pipeline.config import Recipe, load_recipe, recipe_names
from pipeline.contracts import GenerationRequest
from pipeline.images.grid import grid
from pipeline.tracking.steps import Step, StepResult

GOLDEN = Path(__file__).parent / "golden"
UPDATE = "UPDATE_GOLDEN" in os.environ
DEFAULTS = {
    "preprocess": ("data", "preprocess"),
    "tokenizer": ("tokenizer",),
    "tokens": ("encode",),
    "captions": ("caption_encoder",),
    "generator": ("generator",),
    "aligner": ("aligner",),
    "judge": ("imagenet_judge",),
    "evaluate": ("evaluate",),
    "gate": ("promote",),
}
"""By step, the sections whose defaults its work depends on."""
REQUESTS = [
    GenerationRequest("a red apple", seed=1),
    GenerationRequest("红苹果", seed=2, style="noto"),
    GenerationRequest("dog face", seed=3, style="fluent", num_steps=4, guidance_scale=5.0),
    GenerationRequest("rainbow", seed=4, temperature=0.5, negative_prompt="a cloud"),
]


def checked(name: str, found: dict[str, Any], remedy: str) -> None:
    file = GOLDEN / name
    if UPDATE:
        GOLDEN.mkdir(exist_ok=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    known = json.loads(file.read_text())
    changed = sorted(k for k in known.keys() | found.keys() if known.get(k) != found.get(k))
    assert not changed, f"{', '.join(changed)} changed: {remedy}"


def results_of(table: dict[str, Step]) -> dict[str, StepResult]:
    """Results that are named for their steps."""
    return {name: StepResult(name, Path(name), f"the result of {name}", {}, 0.0) for name in table}


def table_of(recipe: Recipe, home: Path) -> dict[str, Step]:
    """Every step of a recipe, evaluation and gate included."""
    plan = resolve(recipe, home)
    table = training_steps(plan)
    found = contest(plan, results_of(table), None)
    return {**table, "evaluate": evaluation_step(plan, found), "gate": gate_step(plan, found)}


def keys_of(recipe: Recipe, home: Path) -> dict[str, str]:
    table = table_of(recipe, home)
    results = results_of(table)
    return {f"{recipe.name}/{name}": step.key(results) for name, step in table.items()}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pretrained_cache: Path) -> Path:
    """A home whose caption encoder is converted already."""
    path = tmp_path_factory.mktemp("golden")
    (path / "pretrained").symlink_to(pretrained_cache)
    return path


def test_step_keys_of_shipped_recipes_are_what_they_were(home: Path) -> None:
    found: dict[str, str] = {}
    for name in recipe_names():
        settings = ["data.shards=[asset:emoji]", "tokenizer.perceptual_weight=0"]
        if name == "emoji-smollm2":  # its language model is a download
            settings.append("generator.causal.language_model=null")
        if name != "emoji-base":
            settings.pop(1)
        found |= keys_of(load_recipe(name, settings, environment={}), home)
    checked("step_keys.json", found, "homes would do these steps again; if that is meant, update")


def test_defaults_that_no_key_knows_of_are_what_they_were(home: Path) -> None:
    default = Recipe.model_validate({"name": "defaults"}).model_dump(mode="json")
    table = table_of(load_recipe("smoke", environment={}), home)
    found = {
        step: [table[step].version, *(_digest(default[section]) for section in sections)]
        for step, sections in DEFAULTS.items()
    }
    remedy = (
        "keys leave settings out that are at their defaults, so results made with the old ones "
        "would pass for new ones: raise the version of the step, then update"
    )
    checked("defaults.json", found, remedy)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def test_the_shipped_base_draws_what_it_drew(pretrained_cache: Path) -> None:
    """To a few levels: other processors round otherwise, and a token may tip over."""
    generator = load_generator("asset:base", pretrained_cache=pretrained_cache, device="cpu")
    drawn = generator.generate(REQUESTS)
    file = GOLDEN / "base.png"
    if UPDATE:
        grid(drawn, len(REQUESTS)).save(file)
    known, found = (np.asarray(image, float) for image in (Image.open(file), grid(drawn, 4)))
    assert known.shape == found.shape
    assert np.abs(known - found).mean() < 4, "those of other seeds differ by 19"
