"""Plan: what a retrain of a recipe would do, and why, without doing it.

tessera plan emoji-demo
tessera plan my-recipe.yaml generator.train.max_steps=500 --json
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from pipeline.chain.plan import Plan, resolve
from pipeline.chain.preflight import check, disk_mb
from pipeline.chain.workflow import plan_statuses, waiting_steps
from pipeline.config import Recipe
from pipeline.tracking.steps import StepStatus


@dataclass(frozen=True)
class Preview:
    """A plan and the state of its steps.

    Attributes:
        disk: MB that the steps to do will take at most, by step, where it can be told.
    """

    plan: Plan
    steps: Sequence[StepStatus]
    disk: Mapping[str, float]


def preview(recipe: Recipe, home: Path) -> Preview:
    """Resolve and check a recipe, and look which of its steps are done.

    Raises:
        TesseraError: the recipe could not be carried out.
    """
    plan = resolve(recipe, home)
    steps = plan_statuses(plan)
    waiting = waiting_steps(plan)
    if waiting:
        check(plan, waiting)
    costs = disk_mb(plan) if waiting else {}
    return Preview(plan, steps, {name: mb for name, mb in costs.items() if name in waiting})


def as_json(found: Preview) -> dict[str, Any]:
    """The preview as JSON values."""
    plan = found.plan
    return {
        "recipe": plan.recipe.name,
        "home": str(plan.home),
        "shards": {uri: manifest.digest for uri, manifest in plan.shards.items()},
        "base": str(plan.base) if plan.base else None,
        "tokenizer": {
            "trains": plan.tokenizer.trains,
            "source": str(plan.tokenizer.source) if plan.tokenizer.source else None,
            "settings": plan.tokenizer.config.model_dump(mode="json"),
        },
        "aligner": str(plan.aligner) if plan.aligner else None,
        "caption_encoder": plan.encoder.source,
        "candidates": {
            name: {
                "family": candidate.config.family,
                "settings": candidate.config.model_dump(mode="json"),
                "image_size": candidate.spec.image_size,
                "num_tokens": candidate.spec.num_tokens,
                "codebook_size": candidate.spec.codebook_size,
                "styles": list(candidate.spec.styles),
            }
            for name, candidate in plan.candidates.items()
        },
        "steps": [
            {
                "step": status.name,
                "state": status.state,
                "why": status.why,
                "path": str(status.path) if status.path else None,
                "inputs": dict(status.inputs),
                "disk_mb": found.disk.get(status.name),
            }
            for status in found.steps
        ],
    }


def plan_table(found: Preview) -> Table:
    """The steps in order: done or to do, why, from which inputs, and what they cost on the disk."""
    plan = found.plan
    table = Table(title=f"{plan.recipe.name} in {plan.home}", show_edge=False, title_justify="left")
    for name in ("step", "state", "why", "inputs"):
        table.add_column(name, overflow="fold")
    table.add_column("disk", justify="right")
    for status in found.steps:
        inputs = ", ".join(f"{name} {value[:8]}" for name, value in status.inputs.items())
        cost = found.disk.get(status.name)
        table.add_row(
            status.name,
            f"[green]{status.state}[/green]" if status.state == "done" else status.state,
            escape(status.why),
            escape(inputs),
            "" if cost is None else f"{max(1, round(cost))} MB",
        )
    total = sum(found.disk.values())
    if total:
        table.add_row("[bold]all[/bold]", "", "", "", f"[bold]{round(total)} MB[/bold]")
    return table
