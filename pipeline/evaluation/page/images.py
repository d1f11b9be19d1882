"""Images for a page: which ones are shown, and each as a data URI of bounded size.

A page shows about 400 images at most, each of at most IMAGE_BYTES, so that it stays below 5 MB
whatever the size of the originals.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pyarrow.compute as pc
from PIL import Image

from pipeline.evaluation.measured import Measured
from pipeline.evaluation.page.report import Report

IMAGE_BYTES = 8_000
SPLITS = ("seen", "unseen")
REDUCTIONS = ((128, 90), (128, 70), (96, 70), (64, 60))
"""Longest side in pixels and WebP quality, tried one by one until an image is small enough."""


@lru_cache(maxsize=1024)  # some images are shown in several places
def data_uri(image: bytes) -> str:
    """A PNG file as a data URI, reduced if it is larger than IMAGE_BYTES or 128 pixels."""
    with Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
        if max(opened.size) <= REDUCTIONS[0][0] and len(image) <= IMAGE_BYTES:
            return _uri("image/png", image)
        pixels = opened.convert("RGB")
    for side, quality in REDUCTIONS:
        reduced = pixels.copy()
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        reduced.save(stream, format="WEBP", quality=quality, method=4)
        if stream.tell() <= IMAGE_BYTES:
            break
    return _uri("image/webp", stream.getvalue())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


@dataclass(frozen=True)
class Row:
    """One caption of the evaluation.

    Attributes:
        number: the row of the candidate's table.
        set, key, split, style, language, caption: as in `Measured.rows`.
    """

    number: int
    set: str
    key: str
    split: str
    style: str
    language: str
    caption: str


class Album:
    """The images of all subjects, found by caption.

    Args:
        report: whose measurements hold the images.
    """

    def __init__(self, report: Report) -> None:
        self.measured = report.measured
        self.candidate = report.measured[report.candidate]
        self.rows = list(_rows(self.candidate))
        self.numbers = {name: _numbers(m) for name, m in report.measured.items()}

    def image(self, subject: str, row: Row) -> bytes | None:
        """A subject's image for a row's caption, or in another language if it does not depend on
        that: the real image, its reconstruction."""
        numbers = self.numbers.get(subject, {})
        number = numbers.get((row.set, row.key, row.language))
        if number is None and subject in ("real", "tokenizer"):
            number = numbers.get((row.set, row.key, self.candidate.language))
        if number is None:
            return None
        image: bytes | None = self.measured[subject].rows["image"][number].as_py()
        return image

    def first(self, gated: int, others: int) -> dict[tuple[str, str, str], list[Row]]:
        """The first rows of every style, split and language, `gated` of the gated style and
        `others` of the others: what is shown is not chosen by how well it came out."""
        groups: dict[tuple[str, str, str], list[Row]] = {}
        for row in sorted(self.rows, key=lambda row: row.style != self.candidate.style):
            group = groups.setdefault((row.style, row.split, row.language), [])
            if len(group) < (gated if row.style == self.candidate.style else others):
                group.append(row)
        return groups

    def sorted_by(self, measure: str, slice_name: str) -> list[tuple[Row, float]]:
        """The rows of a slice with a measure of the candidate, the smallest first."""
        if measure not in self.candidate.measures or slice_name not in self.candidate.slices:
            return []
        column = self.candidate.rows[measure]
        mask = self.candidate.mask(slice_name)
        found = [
            (row, float(value))
            for row in self.rows
            if mask[row.number] and (value := column[row.number].as_py()) is not None
        ]
        return sorted((pair for pair in found if np.isfinite(pair[1])), key=lambda pair: pair[1])

    def nearest_key(self, row: Row) -> str | None:
        """The key of the training image that the candidate's image is nearest to."""
        key: str | None = self.candidate.rows["nearest_key"][row.number].as_py()
        return key


def _rows(measured: Measured) -> Iterator[Row]:
    """Those of real images' captions, at the model's own guidance scale."""
    names: Sequence[str] = ("set", "key", "split", "style", "language", "caption")
    own = pc.is_null(measured.rows["guidance"]).to_pylist()
    for number, values in enumerate(measured.rows.select(names).to_pylist()):
        if own[number] and values["split"] in SPLITS:
            yield Row(number, **values)


def _numbers(measured: Measured) -> dict[tuple[str, str, str], int]:
    return {(row.set, row.key, row.language): row.number for row in _rows(measured)}
