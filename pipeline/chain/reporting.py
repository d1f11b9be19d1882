"""The report of an evaluation: one self-contained HTML page, and the same as JSON.

    write_page(path, plan, evaluation, pixels, title="emoji-demo", winner="candidate",
               decision=decision, curves=curves)

pipeline/evaluation/page draws it; here is gathered what it shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from pipeline import __version__
from pipeline.artifacts import publishing
from pipeline.chain.plan import Plan
from pipeline.contracts import Decision
from pipeline.data.preprocess.store import fixed_width, parquet_files
from pipeline.evaluation.measured import COMPOSITIONS, Measured
from pipeline.evaluation.page.render import render
from pipeline.evaluation.page.report import Composed, Curve, DataSet, Report, report_json
from pipeline.evaluation.reports import Evaluation
from pipeline.images.pixels import encode_png
from pipeline.runtime import code_commit


def write_page(
    path: Path,
    plan: Plan,
    evaluation: Evaluation,
    pixels: Path,
    *,
    title: str,
    subject: str,
    decision: Decision | None = None,
    curves: Mapping[str, Curve] | None = None,
    card: str = "",
) -> None:
    """Write an evaluation's report to `path`, and as JSON beside it.

    Args:
        path: of the page, "report.html"; the JSON is "report.json".
        pixels: the preprocessed images, from which training images are shown.
        title: of the page.
        subject: the one that the report is about.
        decision: of the gate, if there was one.
        curves: of its training, by metric; None leaves them out.
        card: its model card, Markdown.
    """
    measured = {name: evaluation.measured(name) for name in evaluation.reports}
    report = Report(
        title=title,
        created=datetime.now(UTC),
        candidate=subject,
        subjects=tuple(evaluation.reports),
        metrics={name: found.metrics for name, found in evaluation.reports.items()},
        gains=evaluation.gains,
        measured=measured,
        training_image=TrainingImages(pixels, plan.recipe.preprocess.image_size),
        validity=evaluation.validity,
        decision=decision,
        curves=curves,
        compositions=_compositions(measured),
        data=_data(plan),
        card=card,
        settings={
            **evaluation.details,
            "recipe": plan.recipe.model_dump(mode="json", exclude_defaults=True),
            "version": __version__,
            "commit": code_commit(),
        },
    )
    with publishing(path) as file:
        file.write_text(render(report), encoding="utf-8")
    with publishing(path.with_suffix(".json")) as file:
        file.write_text(json.dumps(report_json(report), ensure_ascii=False), encoding="utf-8")


class TrainingImages:
    """Training images by their keys, as PNG files.

    Args:
        pixels: the folder of Parquet files that `preprocess` wrote.
        image_size: pixels per side.
    """

    def __init__(self, pixels: Path, image_size: int) -> None:
        self.pixels, self.image_size = pixels, image_size
        self._read = cache(self._find)

    def __call__(self, key: str) -> bytes | None:
        """None if there is no such image."""
        return self._read(key)

    def _find(self, key: str) -> bytes | None:
        data = pads.dataset([str(path) for path in parquet_files(self.pixels)])
        found = data.to_table(columns=["image"], filter=pads.field("key") == key)
        if not found.num_rows:
            return None
        shape = (3, self.image_size, self.image_size)
        return encode_png(fixed_width(found["image"], np.uint8, shape)[0], {})


def _compositions(measured: Mapping[str, Measured]) -> list[Composed]:
    """Every prompt, with the images and scores of the subjects that drew it."""
    found: dict[tuple[str, str], Composed] = {}
    for name, subject in measured.items():
        if COMPOSITIONS not in subject.slices:
            continue
        for row in subject.rows.filter(pa.array(subject.mask(COMPOSITIONS))).to_pylist():
            new = Composed(row["caption"], row["language"], row["topic"], {}, {})
            entry = found.setdefault((row["key"], row["language"]), new)
            images = {**entry.images, name: row["image"]}
            scores = dict(entry.scores)
            if row["composition"] is not None:
                scores[name] = row["composition"]
            found[row["key"], row["language"]] = replace(entry, images=images, scores=scores)
    return list(found.values())


def _data(plan: Plan) -> list[DataSet]:
    return [
        DataSet(
            uri.rstrip("/").rpartition("/")[2], manifest.digest,
            sum(shard.samples for shard in manifest.shards),
            dict(manifest.styles), dict(manifest.licenses),
        )
        for uri, manifest in plan.shards.items()
    ]  # fmt: skip
