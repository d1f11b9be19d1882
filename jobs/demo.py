"""Demo: draws the picture grid that `tessera demo` ends with.

    tessera demo               at most 15 minutes on 2 CPU cores, then it serves the champion
    tessera demo --no-serve    ends with the grid

The demo itself is the retraining of a recipe (jobs/retrain.py); serving is serve/launch.py's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from pipeline.bundles.bundle import load_generator
from pipeline.bundles.registry import has_champion, resolve_model
from pipeline.chain.workflow import Outcome
from pipeline.config import Recipe
from pipeline.contracts import GenerationRequest
from pipeline.evaluation.eval_set import EvalSet, ImageSet
from pipeline.evaluation.samples import comparison_grid
from pipeline.evaluation.scores import measure_of

IMAGES_PER_SET = 8  # in the grid, of the seen and of the held-out concepts each


MEASURES = ("imagenet_r1", "aligner_r1", "style_match", "kid", "sharpness")


def before_and_after(outcome: Outcome) -> Table:
    """What fine-tuning changed: of all images of the gated style, base, candidate and real ones."""
    shown = [name for name in ("untuned", "candidate", "real") if name in outcome.reports]
    table = Table("metric", "better", *shown)
    for measure in MEASURES:
        metric = f"{measure}/all"
        numbers = [outcome.reports[name].metrics.get(metric) for name in shown]
        if any(numbers):
            cells = (str(number) if number else "" for number in numbers)
            table.add_row(metric, measure_of(metric).better, *cells)
    return table


def served_model(recipe: Recipe, outcome: Outcome, home: Path) -> str:
    """What the demo serves: the champion, or the candidate while no model has won."""
    name = recipe.promote.model_name
    return f"models:/{name}@champion" if has_champion(home, name) else str(outcome.bundle)


def first_grid(recipe: Recipe, outcome: Outcome, home: Path) -> Path:
    """Write HOME/RECIPE.png: one row per caption, drawn before fine-tuning, drawn after, and real.

    Captions are of seen and of held-out concepts, in the languages of evaluation by turns. A recipe
    without a base has no column "before".

    Returns:
        The PNG's path.
    """
    eval_set = EvalSet.from_parquet(
        outcome.pixels, recipe.evaluate, image_size=recipe.preprocess.image_size
    )
    gated = [image_set for image_set in eval_set.sets if image_set.style == eval_set.style]
    shown = [(s.name, i, s) for s in gated for i in range(min(IMAGES_PER_SET, len(s)))]
    prompts = [_prompt(image_set, i) for _, i, image_set in shown]
    columns = {}
    if recipe.base is not None:
        columns["before"] = _draw(
            resolve_model(recipe.base, home=home).path, prompts, eval_set.style, home
        )
    columns["after"] = _draw(outcome.bundle, prompts, eval_set.style, home)
    columns["real"] = torch.stack([image_set.images[i] for _, i, image_set in shown])
    labels = [f"{name}: {prompt}" for (name, _, _), prompt in zip(shown, prompts, strict=True)]
    path = home / f"{recipe.name}.png"
    comparison_grid(columns, labels, scale=2).save(path)
    return path


def _prompt(image_set: ImageSet, index: int) -> str:
    """An image's caption, in another language from one image to the next."""
    languages = list(image_set.captions)
    return image_set.captions[languages[index % len(languages)]][index]


def _draw(bundle: Path, prompts: list[str], style: str, home: Path) -> Tensor:
    """uint8 (len(prompts), 3, S, S), in the style if the bundle knows it."""
    generator = load_generator(bundle, pretrained_cache=home / "pretrained")
    known = style if style in generator.styles else None
    return generator.generate(
        [GenerationRequest(prompt, seed=i, style=known) for i, prompt in enumerate(prompts)]
    )
