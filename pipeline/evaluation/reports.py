"""Evaluation reports as JSON, and as tables for people.

    path.write_text(json.dumps(to_dict(report), ensure_ascii=False))
    print(markdown_table([real, reconstructed, champion, candidate]))

A report itself is `contracts.EvalReport`; pipeline/evaluation/evaluator.py says what its metrics
mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.contracts import EvalReport, Interval
from pipeline.errors import DataError

FORMAT = 3
"""The version of what evaluation reports. It is part of the step's key, so that reports of an older
version are made anew."""


def to_dict(report: EvalReport) -> dict[str, Any]:
    """What `json.dumps` accepts."""
    return asdict(report)


def from_dict(values: Mapping[str, Any]) -> EvalReport:
    """The inverse of `to_dict`, also of values that were read from JSON.

    Raises:
        DataError: it is not a report.
    """
    try:
        metrics = {name: Interval(**item) for name, item in values["metrics"].items()}
        return EvalReport(values["subject"], metrics, values["details"], values["grids"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an evaluation report ({error!r}); evaluate again") from error


def metric_values(report: EvalReport) -> dict[str, float]:
    """The metrics without their intervals, for a tracking server."""
    return {name: item.value for name, item in report.metrics.items()}


def markdown_table(reports: Sequence[EvalReport]) -> str:
    """One row per metric, one column per report: value and 95 % interval."""
    names = list(dict.fromkeys(name for report in reports for name in report.metrics))
    lines = [
        "| metric | " + " | ".join(report.subject for report in reports) + " |",
        "|---|" + "---|" * len(reports),
    ]
    for name in names:
        cells = (report.metrics.get(name) for report in reports)
        lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines)


def _cell(item: Interval | None) -> str:
    if item is None:
        return ""
    if item.low == item.high:
        return f"{item.value:.3f}"
    return f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}]"
