"""An evaluation: what was measured of several subjects on the same images, as files and as tables.

    evaluation = Evaluation.make(directory, measured, validity, pairs=[("untuned", "candidate")],
                                 details={...}, bootstrap=1000, seed=0)
    evaluation = Evaluation.load(directory)      # evaluation.json, report.md, measurements/
    evaluation.comparison("champion", "candidate").gain("imagenet_r1/all")
    print(markdown_table(evaluation.reports.values()))

A subject's report itself is `contracts.EvalReport`; pipeline/evaluation/scores.py says what its
metrics mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import publishing
from pipeline.contracts import EvalReport, Interval
from pipeline.errors import DataError
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.validity import Validity

if TYPE_CHECKING:  # most scheduled retrains find everything evaluated: metrics take seconds to load
    from pipeline.evaluation.scores import Comparison

FORMAT = 4
"""The version of what evaluation reports. It is part of the step's key, so that reports of an older
version are made anew."""
RESULT, TABLE, MEASUREMENTS = "evaluation.json", "report.md", "measurements"
PAGE = "report.html"

Gains = Mapping[str, Mapping[str, Mapping[str, Interval]]]
"""By subject, by the subject that it is compared with, by metric; above zero is better."""


@dataclass(frozen=True)
class Evaluation:
    """Reports of subjects that were measured together.

    Attributes:
        directory: holds the files, among them measurements/SUBJECT.parquet.
        reports: by subject.
        gains: of a subject over another.
        validity: by judge.
        details: what was evaluated on: eval_set (a digest), style, languages, images per set,
            bootstrap, seed, judges.
    """

    directory: Path
    reports: Mapping[str, EvalReport]
    gains: Gains
    validity: Mapping[str, Validity]
    details: Mapping[str, Any]

    @classmethod
    def make(
        cls,
        directory: Path,
        measured: Mapping[str, Measured],
        validity: Mapping[str, Validity],
        *,
        pairs: Sequence[tuple[str, str]],
        details: Mapping[str, Any],
        bootstrap: int,
        seed: int,
    ) -> Evaluation:
        """Compute every number, and write evaluation.json, report.md and the measurements.

        Args:
            directory: for the files; made if it is not there.
            pairs: (before, after) subjects whose gains are reported.
            bootstrap, seed: of the intervals.

        Raises:
            DataError: the subjects of a pair were measured on different images.
        """
        from pipeline.evaluation.scores import Comparison, scores

        real, how = measured["real"], {"bootstrap": bootstrap, "seed": seed}
        reports = {
            name: EvalReport(name, scores(subject, real, **how), dict(details))
            for name, subject in measured.items()
        }
        gains: dict[str, dict[str, Mapping[str, Interval]]] = {}
        for before, after in pairs:
            comparison = Comparison(measured[before], measured[after], real, **how)
            gains.setdefault(after, {})[before] = comparison.gains()
        found = cls(directory, reports, gains, validity, {**details, **how})
        (directory / MEASUREMENTS).mkdir(parents=True, exist_ok=True)
        for subject in measured.values():
            subject.save(directory / MEASUREMENTS)
        with publishing(directory / TABLE) as file:
            file.write_text(markdown_table(reports.values()), encoding="utf-8")
        with publishing(directory / RESULT) as file:
            file.write_text(json.dumps(found.to_dict(), ensure_ascii=False, indent=1), "utf-8")
        return found

    def measured(self, subject: str) -> Measured:
        """A subject's measurements.

        Raises:
            DataError: there are none, or the file is damaged.
        """
        return Measured.load(self.directory / MEASUREMENTS, subject)

    def comparison(self, before: str, after: str) -> Comparison:
        """Two of the subjects, on the same captions.

        Raises:
            DataError: one of them was not evaluated.
        """
        from pipeline.evaluation.scores import Comparison

        return Comparison(
            *(self.measured(name) for name in (before, after, "real")),
            bootstrap=self.details["bootstrap"],
            seed=self.details["seed"],
        )

    def to_dict(self) -> dict[str, Any]:
        """All but the measurements, as `json.dumps` accepts it."""
        return {
            "format": FORMAT,
            "reports": {name: asdict(report) for name, report in self.reports.items()},
            "gains": {
                after: {
                    before: {metric: asdict(gain) for metric, gain in gains.items()}
                    for before, gains in over.items()
                }
                for after, over in self.gains.items()
            },
            "validity": {name: asdict(found) for name, found in self.validity.items()},
            "details": dict(self.details),
        }

    @classmethod
    def load(cls, directory: Path) -> Evaluation:
        """Read what `make` wrote.

        Raises:
            DataError: there is no evaluation, or one of another version.
        """
        try:
            values = json.loads((directory / RESULT).read_text(encoding="utf-8"))
            reports = {name: from_dict(report) for name, report in values["reports"].items()}
            gains = {
                after: {
                    before: {metric: Interval(**gain) for metric, gain in found.items()}
                    for before, found in over.items()
                }
                for after, over in values["gains"].items()
            }
            validity = {name: Validity(**found) for name, found in values["validity"].items()}
            return cls(directory, reports, gains, validity, values["details"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{directory} holds no evaluation that this version reads ({error!r}): evaluate "
                "again"
            ) from error


def from_dict(values: Mapping[str, Any]) -> EvalReport:
    """A report from what `dataclasses.asdict` made of it, also of values read from JSON.

    Raises:
        DataError: it is not a report.
    """
    try:
        metrics = {name: Interval(**item) for name, item in values["metrics"].items()}
        return EvalReport(values["subject"], metrics, values["details"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not an evaluation report ({error!r}); evaluate again") from error


def metric_values(report: EvalReport) -> dict[str, float]:
    """The metrics without their intervals, for a tracking server."""
    return {name: item.value for name, item in report.metrics.items()}


def markdown_table(reports: Iterable[EvalReport]) -> str:
    """One row per metric, one column per report: value and 95 % interval."""
    reports = list(reports)
    names = list(dict.fromkeys(name for report in reports for name in report.metrics))
    lines = [
        "| metric | " + " | ".join(report.subject for report in reports) + " |",
        "|---|" + "---|" * len(reports),
    ]
    for name in names:
        found = (report.metrics.get(name) for report in reports)
        cells = (item.short if item else "" for item in found)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
