"""Retrain: run a recipe's whole chain, from shards to the decision whether to promote.

tessera retrain emoji-demo
tessera retrain my-recipe.yaml generator.train.max_steps=500
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.chain import workflow
from pipeline.chain.plan import resolve
from pipeline.chain.workflow import Outcome
from pipeline.config import CanaryConfig, Recipe
from pipeline.evaluation.reports import metric_values
from pipeline.tracking.steps import Reporter
from serve.canary import check_servable


def retrain(recipe: Recipe, home: Path, reporter: Reporter, *, debug: bool = False) -> Outcome:
    """Run every step that was not done before.

    Raises:
        TesseraError: something the user can mend; finished steps are kept.
    """
    plan = resolve(recipe, home)
    check = partial(_check_servable, home=home, config=recipe.promote.canary)
    return workflow.retrain(plan, reporter, check_servable=check, debug=debug)


def _check_servable(bundle: Path, *, home: Path, config: CanaryConfig) -> None:
    check_servable(bundle, home, config)


def summary(outcome: Outcome) -> dict[str, Any]:
    """What `tessera retrain --json` prints, as JSON values."""
    return {
        "bundle": str(outcome.bundle),
        "promoted": outcome.decision.promoted,
        "reasons": list(outcome.decision.reasons),
        "choice": list(outcome.choice),
        "version": outcome.version,
        "run_id": outcome.run.run_id,
        "tracking_uri": outcome.run.tracking_uri,
        "seconds": outcome.seconds,
        "report": str(outcome.page) if outcome.page else None,
        "metrics": {name: metric_values(report) for name, report in outcome.reports.items()},
    }
