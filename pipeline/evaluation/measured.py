"""What was measured of one subject's images: a table of one row per image.

Every number of a report, every gain over another subject and every rule of the promotion gate is
computed from such tables (pipeline/evaluation/scores.py), so that two models can be compared long
after they were evaluated.

    measured.save(directory)                        # directory/SUBJECT.parquet
    champion = Measured.load(directory, "champion")
    champion.values("imagenet_r1", "unseen")        # float64, one per image of the slice

The rows of all subjects of one evaluation are of the same captions in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.artifacts import publishing
from pipeline.errors import DataError

COLUMNS = {
    "set": pa.string(),
    "style": pa.string(),
    "split": pa.string(),
    "language": pa.string(),
    "guidance": pa.float64(),
    "key": pa.string(),
    "caption": pa.string(),
    "topic": pa.string(),
    "words": pa.int64(),
    "image": pa.binary(),
    "nearest_key": pa.string(),
    "features": pa.list_(pa.float32()),
}
"""The columns that describe a row, with their types; all others are measures (float64).

set: style and split, "twemoji/seen". split: "seen" (of the training split) or "unseen" (of the test
split). guidance: the guidance scale that was asked for; null for the model's own. topic: a group of
captions of similar meaning, named by its central one. words: of the caption. image: a PNG file.
nearest_key: the training image that the image is nearest to. features: for distances between sets;
null where none is computed.
"""

COMPOSITIONS = "compositions"
"""The split of images whose prompts are in no training set; they have no style, their topic is the
kind of composition, and they are in no slice but "compositions", compositions:LANGUAGE and
kind:KIND."""
SHUFFLED = "shuffled"
"""The subject that is the real images against other images' captions: what chance finds."""
WORD_SLICES = {"1": (1, 1), "2-3": (2, 3), "4 or more": (4, 1_000_000)}
DIMENSIONS = ("split", "language", "style", "topic", "words", "guidance")
"""What rows can be sliced by; a slice's name is "all", "seen", "unseen" or DIMENSION:VALUE."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """The measurements of one subject.

    Attributes:
        subject: "candidate", "champion", "real" ...
        rows: one row per image, with the columns of COLUMNS and one per measure; a measure that was
            not taken of an image is null.
        scalars: numbers of the subject as a whole: latency_s, images_per_s, size_mb,
            validation_loss.
        style: the gated style, which the slice "all" is of.
        language: the first language of the evaluation, which the slice "all" is of.
    """

    subject: str
    rows: pa.Table
    scalars: Mapping[str, float]
    style: str
    language: str

    @property
    def measures(self) -> list[str]:
        """The names of the columns that are measures."""
        return [name for name in self.rows.column_names if name not in COLUMNS]

    def values(self, measure: str, slice_name: str) -> NDArray[np.float64]:
        """A measure of the images of a slice, in the order of the rows; images that it was not
        taken of are left out.

        Raises:
            KeyError: there is no such measure or slice.
        """
        column = self.rows[measure].combine_chunks()
        taken = column.is_valid().to_numpy(zero_copy_only=False)
        mask = self.mask(slice_name) & taken
        found: NDArray[np.float64] = column.to_numpy(zero_copy_only=False)[mask].astype(float)
        return found

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """(rows, D); zeros where there are none."""
        column = self.rows["features"].combine_chunks()
        width = max((len(row) for row in column[:1].to_pylist() if row is not None), default=0)
        width = width or int(pc.max(pc.list_value_length(column)).as_py() or 0)
        found = np.zeros((len(column), width), np.float32)
        mask = column.is_valid().to_numpy(zero_copy_only=False)
        if width:
            flat = column.flatten().to_numpy(zero_copy_only=False)
            found[mask] = flat.reshape(-1, width)
        return found

    def features_of(self, slice_name: str) -> NDArray[np.float32]:
        """(N, D) of the images of a slice that have features.

        Raises:
            KeyError: there is no such slice.
        """
        has = self.rows["features"].combine_chunks().is_valid().to_numpy(zero_copy_only=False)
        chosen: NDArray[np.float32] = self.features[self.mask(slice_name) & has]
        return chosen

    @cached_property
    def slices(self) -> dict[str, Mask]:
        """The rows of every slice, by its name."""
        columns = {
            n: np.array(self.rows[n].to_pylist(), object) for n in COLUMNS if n not in _HEAVY
        }
        own = columns["guidance"] == None  # noqa: E711  # elementwise
        gated = (columns["style"] == self.style) & (columns["language"] == self.language) & own
        found = {"all": gated}
        for split in dict.fromkeys(columns["split"]):
            found[split] = gated & (columns["split"] == split)
        for language in dict.fromkeys(columns["language"]):
            found[f"language:{language}"] = (
                (columns["style"] == self.style) & (columns["language"] == language) & own
            )
        for style in dict.fromkeys(s for s in columns["style"] if s is not None):
            found[f"style:{style}"] = (
                (columns["style"] == style) & (columns["language"] == self.language) & own
            )
        for topic in dict.fromkeys(t for t in columns["topic"] if t):
            found[f"topic:{topic}"] = gated & (columns["topic"] == topic)
        for name, (least, most) in WORD_SLICES.items():
            words = columns["words"].astype(float)
            found[f"words:{name}"] = gated & (words >= least) & (words <= most)
        for scale in sorted({s for s in columns["guidance"] if s is not None}):
            found[f"guidance:{scale:g}"] = columns["guidance"] == scale
        composed = columns["split"] == COMPOSITIONS
        found[COMPOSITIONS] = composed
        for language in dict.fromkeys(columns["language"]):
            found[f"{COMPOSITIONS}:{language}"] = composed & (columns["language"] == language)
        for kind in dict.fromkeys(columns["topic"][composed]):
            found[f"kind:{kind}"] = composed & (columns["topic"] == kind)
        return {name: mask.astype(bool) for name, mask in found.items() if mask.any()}

    def mask(self, slice_name: str) -> Mask:
        """Which rows belong to a slice: (rows,).

        Raises:
            KeyError: there is no such slice.
        """
        return self.slices[slice_name]

    def save(self, directory: Path) -> Path:
        """Write directory/SUBJECT.parquet."""
        values = {
            "subject": self.subject, "scalars": dict(self.scalars),
            "style": self.style, "language": self.language,
        }  # fmt: skip
        path = directory / f"{self.subject}.parquet"
        rows = self.rows.replace_schema_metadata({"tessera": json.dumps(values)})
        with publishing(path) as file:
            pq.write_table(rows, file, compression="zstd")
        return path

    @classmethod
    def load(cls, directory: Path, subject: str) -> Measured:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or a damaged one.
        """
        path = directory / f"{subject}.parquet"
        try:
            rows = pq.read_table(path)
            values = json.loads(rows.schema.metadata[b"tessera"])
            return cls(
                values["subject"], rows, values["scalars"], values["style"], values["language"]
            )
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path} holds no measurements that this version reads ({error}): evaluate again"
            ) from error


_HEAVY = ("image", "features", "nearest_key", "caption", "key", "set")


def check_paired(before: Measured, after: Measured, slice_name: str) -> None:
    """Check that a slice of both is of the same captions in the same order.

    Raises:
        DataError: it is not.
    """
    names = ["set", "language", "guidance", "key"]
    tables = [s.rows.select(names).filter(pa.array(s.mask(slice_name))) for s in (before, after)]
    if not tables[0].equals(tables[1]):
        raise DataError(
            f"{before.subject} and {after.subject} were evaluated on different images: evaluate "
            "both together"
        )
