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

from pipeline.chain.plan import Plan, resolve
from pipeline.chain.table import aligner_of, bundles_of, pixels_of, tokenizer_of
from pipeline.chain.workflow import Session, opened
from pipeline.config import Recipe
from pipeline.evaluation.reports import metric_values
from pipeline.tracking.steps import Reporter


def _preprocess(session: Session) -> dict[str, Any]:
    results = session.run("preprocess")
    return {"path": str(pixels_of(results)), **results["preprocess"].values}


def _pretrain(session: Session) -> dict[str, Any]:
    results = session.run("tokenizer") if session.plan.tokenizer.trains else {}
    return {"path": str(tokenizer_of(session.plan, results))}


def _align(session: Session) -> dict[str, Any]:
    results = session.run("aligner") if session.plan.aligner is None else {}
    return {"path": str(aligner_of(session.plan, results))}


def _train(session: Session) -> dict[str, Any]:
    """The candidate's bundle. Of several, all are trained and evaluated to tell which one it is."""
    plan = session.plan
    if not plan.recipe.candidates:
        (candidate,) = plan.candidates.values()
        trained = session.run(candidate.step)[candidate.step]
        return {"path": str(trained.bundle), **trained.values}
    ruling = session.judge().ruling
    results = session.results
    winner = results[plan.candidates[ruling.winner].step]
    return {
        "path": str(winner.bundle),
        **winner.values,
        "candidate": ruling.winner,
        "choice": list(ruling.choice),
        "candidates": {name: str(path) for name, path in bundles_of(plan, results).items()},
    }


def _evaluate(session: Session) -> dict[str, Any]:
    judged = session.judge()
    metrics = {name: metric_values(r) for name, r in judged.evaluation.reports.items()}
    return {"path": str(judged.ruling.page), "metrics": metrics}


STEPS: dict[str, Callable[[Session], dict[str, Any]]] = {
    "preprocess": _preprocess,
    "pretrain": _pretrain,
    "align": _align,
    "train": _train,
    "evaluate": _evaluate,
}


def run_step(
    name: str, recipe: Recipe, home: Path, reporter: Reporter, *, debug: bool = False
) -> dict[str, Any]:
    """Run one of STEPS and what it needs; what was done before is skipped.

    Returns:
        "path" of the result, and the step's values.

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    plan = resolve(recipe, home)
    with opened(plan, reporter, *targets_of(name, plan), debug=debug) as session:
        return STEPS[name](session)


def targets_of(name: str, plan: Plan) -> tuple[str, ...]:
    """The steps that one of STEPS asks for; none stands for all."""
    if name == "preprocess":
        return ("preprocess",)
    if name == "pretrain" and plan.tokenizer.trains:
        return ("tokenizer",)
    if name == "align" and plan.aligner is None:
        return ("aligner",)
    if name == "train" and not plan.recipe.candidates:
        return tuple(candidate.step for candidate in plan.candidates.values())
    return ()
