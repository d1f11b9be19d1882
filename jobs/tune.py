"""Tune: search better settings for a recipe's generator, and write the best ones as a recipe.

tessera tune my-recipe.yaml --out best.yaml
tessera train best.yaml
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from jobs.options import check_output
from pipeline.artifacts import publishing
from pipeline.chain.plan import resolve
from pipeline.chain.tuning import draw_trials, search
from pipeline.chain.workflow import opened
from pipeline.config import Recipe
from pipeline.tracking.steps import Reporter


def run_search(
    recipe: Recipe,
    home: Path,
    reporter: Reporter,
    *,
    out: Path | None = None,
    debug: bool = False,
) -> dict[str, Any]:
    """Run every trial that was not finished before.

    Args:
        out: where to put a copy of the best recipe.

    Returns:
        As pipeline.chain.tuning.search, with "path" being `out` if that is given.

    Raises:
        TesseraError: something the user can mend; finished trials are kept.
    """
    if out is not None:
        check_output(out)
    plan = resolve(recipe, home)
    trials = draw_trials(plan)
    with opened(plan, reporter, debug=debug) as session:
        result = search(session, trials)
    if out is not None:
        with publishing(out) as new:
            shutil.copyfile(result["path"], new)
        result["path"] = str(out)
    return result
