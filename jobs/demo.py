"""Demo: the shipped base fine-tuned, tested before against after, promoted, shown, served.

tessera demo               at most 15 minutes on 2 CPU cores, then the server stays up
tessera demo --no-serve    ends with the picture grid
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pipeline.bundle import load_generator
from pipeline.config import Recipe
from pipeline.contracts import GenerationRequest
from pipeline.drawing import comparison_grid
from pipeline.evalset import EvalSet, ImageSet
from pipeline.model_registry import resolve_model
from pipeline.workflow import Outcome

PICTURES = 8


def first_grid(recipe: Recipe, outcome: Outcome, home: Path) -> Path:
    """Seen and unseen concepts, asked in English and Chinese: before | after | real.

    Returns:
        The PNG's path.
    """
    eval_set = EvalSet.from_parquet(
        outcome.pixels, recipe.evaluate, image_size=recipe.preprocess.image_size
    )
    gated = [pictures for pictures in eval_set.sets if pictures.style == eval_set.style]
    shown = [(p.name, i, p) for p in gated for i in range(min(PICTURES, len(p)))]
    prompts = [_prompt(pictures, i) for _, i, pictures in shown]
    columns = {}
    if recipe.base is not None:
        columns["before"] = _draw(
            resolve_model(recipe.base, home=home).path, prompts, eval_set.style, home
        )
    columns["after"] = _draw(outcome.bundle, prompts, eval_set.style, home)
    columns["real"] = torch.stack([pictures.images[i] for _, i, pictures in shown])
    labels = [f"{name}: {prompt}" for (name, _, _), prompt in zip(shown, prompts, strict=True)]
    path = home / f"{recipe.name}.png"
    comparison_grid(columns, labels, scale=2).save(path)
    return path


def _prompt(pictures: ImageSet, index: int) -> str:
    """Languages take turns."""
    languages = list(pictures.captions)
    return pictures.captions[languages[index % len(languages)]][index]


def _draw(bundle: Path, prompts: list[str], style: str, home: Path) -> Tensor:
    generator = load_generator(bundle, pretrained_cache=home / "pretrained")
    known = style if style in generator.styles else None
    return generator.generate(
        [GenerationRequest(prompt, seed=i, style=known) for i, prompt in enumerate(prompts)]
    )
