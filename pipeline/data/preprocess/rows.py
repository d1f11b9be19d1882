"""Encoded samples -> rows of pixels: each sample becomes one row, whatever is wrong with it.

Preprocessing decodes the samples of a shard into rows (schema STAGED). A sample that can be used
gets its pixels, captions and split; any other keeps its row with the reason as its outcome. Nothing
that a sample holds raises, because Ray Data knows no errors by row: one bad image would cost its
whole block.

    row = RowDecoder(None, data, config).row(sample)      # a reader.EncodedSample
    row["outcome"]                                        # "accepted", "left_out" or a reason

Rules that compare rows with each other, such as duplicates, come after in
pipeline/data/preprocess/report.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.config import DataConfig, PreprocessConfig
from pipeline.contracts import Caption
from pipeline.data.preprocess.decode import BadImage, decode
from pipeline.data.preprocess.reader import EncodedSample
from pipeline.data.shards.captions import BadCaption, captions_of, speaks
from pipeline.data.shards.records import FIELDS
from pipeline.data.shards.splits import split_of
from pipeline.errors import ResourceError
from pipeline.images.pixels import to_pil

ACCEPTED, LEFT_OUT = "accepted", "left_out"  # outcomes; every other one is a reason for quarantine

_CAPTION = pa.struct([("text", pa.string()), ("language", pa.string())])
PIXELS = pa.schema(
    [
        ("key", pa.string()),
        ("group", pa.string()),
        ("style", pa.string()),
        ("split", pa.string()),
        ("image", pa.binary()),  # uint8 (3, S, S)
        ("captions", pa.list_(_CAPTION)),
        ("source", pa.string()),
        ("license", pa.string()),
        ("attribution", pa.string()),
        ("shard", pa.string()),
    ]
)
"""What preprocessing writes of accepted samples."""
STAGED = pa.schema(
    [
        *PIXELS,
        ("index", pa.int64()),  # of the sample in its shard
        ("digest", pa.binary()),  # of the pixels: equal images have equal ones
        ("perceptual_hash", pa.uint64()),  # null unless preprocess.deduplicate=perceptual
        ("outcome", pa.string()),
        ("captions_left_out", pa.list_(pa.string())),  # of an accepted sample, their reasons
    ]
)
"""What is kept of every sample while preprocessing runs."""


@dataclass(frozen=True)
class RowDecoder:
    """Encoded samples -> STAGED rows.

    Attributes:
        groups: samples of other groups are left out; None keeps all.
        data: how groups are split.
        config: what an image becomes and what is refused.
    """

    groups: frozenset[str] | None
    data: DataConfig
    config: PreprocessConfig

    def table(self, samples: Sequence[EncodedSample]) -> pa.Table:
        """One STAGED row per sample."""
        return pa.Table.from_pylist([self.row(sample) for sample in samples], schema=STAGED)

    def row(self, sample: EncodedSample) -> dict[str, Any]:
        """One sample's row; columns that its outcome leaves unknown are absent."""
        row: dict[str, Any] = {
            "key": sample["key"],
            "shard": sample["shard"],
            "index": sample["index"],
        }
        try:
            if sample["problem"] is not None:
                raise BadImage(sample["problem"])
            record = parse_record(sample["record"])
            if self.groups is not None and record["group"] not in self.groups:
                return row | {"outcome": LEFT_OUT}
            captions, left_out = self._captions(record.get("captions"))
            if sample["image"] is None:
                raise BadImage("no_picture")
            pixels = decode(sample["image"], self.config, key=sample["key"])
        except (BadCaption, BadImage) as error:
            return row | {"outcome": error.reason}
        row["captions_left_out"] = list(left_out)
        return row | self._accepted(record, captions, pixels)

    def _accepted(
        self, record: dict[str, Any], captions: Sequence[Caption], pixels: NDArray[np.uint8]
    ) -> dict[str, Any]:
        """The columns that only accepted rows have, and their outcome."""
        image = pixels.tobytes()
        is_hashed = self.config.deduplicate == "perceptual"
        return {
            "outcome": ACCEPTED,
            "image": image,
            "digest": hashlib.blake2b(image, digest_size=16).digest(),
            "perceptual_hash": perceptual_hash(pixels) if is_hashed else None,
            "captions": [dataclasses.asdict(caption) for caption in captions],
            "split": split_of(
                record["group"],
                self.data.split_seed,
                self.data.validation_fraction,
                self.data.test_fraction,
            ),
            **{name: record[name] for name in FIELDS},
        }

    def _captions(self, raw: Any) -> tuple[tuple[Caption, ...], tuple[str, ...]]:
        """The captions in the languages that the config keeps, and the reasons of those that cannot
        be used.

        Raises:
            BadCaption: as `captions_of`; other_language if no caption is left.
        """
        config = self.config
        if config.languages and isinstance(raw, list) and raw:
            raw = [caption for caption in raw if self._is_kept(caption)]
            if not raw and config.require_captions:
                raise BadCaption("other_language")
        if raw == [] and not config.require_captions:
            return (), ()
        return captions_of(raw, config.max_caption_chars)

    def _is_kept(self, caption: Any) -> bool:
        """In a language to keep; or malformed, so that `captions_of` refuses it."""
        language = caption.get("language") if isinstance(caption, dict) else None
        return not isinstance(language, str) or speaks(language, self.config.languages)


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """uint8 (3, S, S) -> 64 bits, few of which differ between images that look alike (pHash)."""
    imagehash = load_imagehash()
    bits = imagehash.phash(to_pil(pixels)).hash
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def load_imagehash() -> Any:
    """The library of perceptual hashes.

    Raises:
        ResourceError: it is not installed.
    """
    try:
        import imagehash
    except ImportError as error:
        raise ResourceError(
            "preprocess.deduplicate=perceptual needs ImageHash: pip install 'tessera[dedup]'"
        ) from error
    return imagehash


def parse_record(encoded: bytes | None) -> dict[str, Any]:
    """A sample's JSON record: every text field is present, and none but the attribution is empty.

    Raises:
        BadCaption: bad_utf8 or bad_json.
    """
    if not isinstance(encoded, bytes):
        raise BadCaption("bad_json")
    try:
        record = json.loads(encoded.decode("utf-8"))
        valid = isinstance(record, dict) and all(
            isinstance(record.get(name), str) and (record[name].encode() or name == "attribution")
            for name in FIELDS
        )
    except UnicodeError as error:
        raise BadCaption("bad_utf8") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise BadCaption("bad_json") from error
    if not valid:
        raise BadCaption("bad_json")
    return dict(record)


def group_of(encoded: bytes | None) -> str | None:
    """A record's group; None where the record is one that `RowDecoder` refuses."""
    try:
        return str(parse_record(encoded)["group"])
    except BadCaption:
        return None
