"""Steps: run a recipe's chain up to one step, with whatever that step needs before it.

tessera preprocess RECIPE      shards -> pixels and quarantine
tessera pretrain RECIPE        the image tokenizer, trained on images alone
tessera align RECIPE           the aligner that evaluation retrieves captions with
tessera train RECIPE           the generator: the candidate's bundle, the best of several
tessera evaluate RECIPE        the candidate beside champion, untuned base and floors
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import Recipe
from pipeline.runtime import ray_runtime
from pipeline.steps import Reporter
from pipeline.workflow import Chain


def _preprocess(chain: Chain) -> dict[str, Any]:
    return {"path": str(chain.pixels), **chain.preprocessed.values}


def _train(chain: Chain) -> dict[str, Any]:
    """The candidate's bundle. Of several, all are trained and evaluated to tell which one it is."""
    trained = chain.generators
    winner, reasons = chain.choice
    result = {"path": str(trained[winner].path / "bundle"), **trained[winner].values}
    if reasons:
        bundles = {name: str(step.path / "bundle") for name, step in trained.items()}
        result |= {"candidate": winner, "choice": list(reasons), "candidates": bundles}
    return result


def _evaluate(chain: Chain) -> dict[str, Any]:
    return {"path": str(chain.evaluation.path / "report.md"), **chain.evaluation.values}


STEPS: dict[str, Callable[[Chain], dict[str, Any]]] = {
    "preprocess": _preprocess,
    "pretrain": lambda chain: {"path": str(chain.tokenizer)},
    "align": lambda chain: {"path": str(chain.aligner)},
    "train": _train,
    "evaluate": _evaluate,
}


def run_step(
    name: str, recipe: Recipe, home: Path, reporter: Reporter, *, debug: bool = False
) -> dict[str, Any]:
    """Run one of STEPS and what it needs; what was done before is skipped.

    Returns:
        "path" of the result, and the step's values.
    """
    chain = Chain(recipe, home, reporter)
    with chain.open(), ray_runtime(debug=debug):
        return STEPS[name](chain)
