"""What a report shows, in one object; and the same, without images, as JSON.

report = Report(title="emoji-demo", created=datetime.now(UTC), candidate="candidate", ...)
path.write_text(render(report), encoding="utf-8")          # pipeline/evaluation/page/render.py
path.write_text(json.dumps(report_json(report), ensure_ascii=False), encoding="utf-8")
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from pipeline.contracts import Decision, Interval
from pipeline.evaluation.measured import Measured
from pipeline.evaluation.validity import Validity

Curve = Sequence[tuple[float, float]]
"""Points (step, value) of a training curve."""


@dataclass(frozen=True)
class Composed:
    """What models made of one prompt of pipeline/evaluation/compositions.py.

    Attributes:
        prompt: what was asked for.
        language: BCP 47 tag of the prompt.
        kind: what is composed: "colour", "count", "relation" ...
        images: PNG files by subject.
        scores: 0 to 1 by subject, where 1 is as asked for; of images that pixels do not tell of,
            none or NaN.
    """

    prompt: str
    language: str
    kind: str
    images: Mapping[str, bytes] = field(repr=False)
    scores: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSet:
    """A data set that was trained or evaluated on.

    Attributes:
        name: what people call it, or where it lies.
        digest: SHA-256.
        samples: how many images.
        styles, licenses: images by each.
        attribution: the credits that its licences ask for.
    """

    name: str
    digest: str
    samples: int
    styles: Mapping[str, int]
    licenses: Mapping[str, int]
    attribution: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """All that a report shows of one candidate beside what it is compared with.

    Attributes:
        title: of the page.
        created: when it was evaluated.
        candidate: the subject that the report is about.
        subjects: all that were evaluated, in the order of the table's columns.
        metrics: by subject, by metric (pipeline/evaluation/scores.py).
        gains: by subject, by the subject that it is compared with, by metric; above zero is better.
        measured: the measurements of each subject, with its images.
        training_image: the PNG file of a training image by its key; None if it is not to be had.
        validity: by judge; a later judge is more independent of the models' training.
        decision: of the promotion gate; None if none was asked for.
        curves: training curves by the metric's name; "train_NAME" and "validation_NAME" are drawn
            together. Empty if its training left none, None to leave them out.
        compositions: the fixed prompts of things that no training set holds.
        data: the data sets.
        card: the candidate's model card, Markdown.
        settings: seeds, sizes, digests of judges, code version; may be nested.
    """

    title: str
    created: datetime
    candidate: str
    subjects: tuple[str, ...]
    metrics: Mapping[str, Mapping[str, Interval]]
    gains: Mapping[str, Mapping[str, Mapping[str, Interval]]]
    measured: Mapping[str, Measured]
    training_image: Callable[[str], bytes | None] = lambda key: None
    validity: Mapping[str, Validity] = field(default_factory=dict)
    decision: Decision | None = None
    curves: Mapping[str, Curve] | None = None
    compositions: Sequence[Composed] = ()
    data: Sequence[DataSet] = ()
    card: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def before(self) -> tuple[str, ...]:
        """The subjects that the candidate is compared with."""
        return tuple(self.gains.get(self.candidate, {}))

    def judge_of(self, metric: str) -> str | None:
        """The judge whose metric this is; None if no judge is asked."""
        measure = metric.partition("/")[0]
        fitting = (n for n in self.validity if measure == n or measure.startswith(f"{n}_"))
        return max(fitting, key=len, default=None)

    def is_valid(self, metric: str) -> bool:
        """Whether the metric can be believed on this data."""
        judge = self.judge_of(metric)
        return judge is None or self.validity[judge].valid


def report_json(report: Report) -> dict[str, Any]:
    """The report without images, curves and model card, as `json.dumps` accepts it.

    Numbers that are not finite, which JSON does not know, become None.
    """
    found: dict[str, Any] = _plain(
        {
            "title": report.title,
            "created": report.created.isoformat(),
            "candidate": report.candidate,
            "subjects": report.subjects,
            "metrics": report.metrics,
            "gains": report.gains,
            "validity": report.validity,
            "decision": report.decision,
            "compositions": [
                {"prompt": c.prompt, "language": c.language, "kind": c.kind, "scores": c.scores}
                for c in report.compositions
            ],
            "data": report.data,
            "settings": report.settings,
        }
    )
    return found


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case Mapping():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case Interval() | Validity() | Decision() | DataSet():
            return _plain(asdict(value))
        case str() | int() | None:
            return value
        case _:
            return str(value)
