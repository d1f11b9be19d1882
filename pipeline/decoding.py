"""One encoded sample -> one row of pixels, or the reason why not.

Ray Data has no error handling by row (one bad picture costs its whole block), so `Decoder` catches
what a bad sample raises and writes it down as the row's outcome.

    row = Decoder(None, data, config).row({"key": "k", "shard": "s", "number": 0, ...})
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipeline.captions import BadCaption, captions_of, speaks
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.contracts import Caption
from pipeline.errors import ResourceError
from pipeline.image_decode import BadImage, decode
from pipeline.images import to_pil
from pipeline.records import TEXTS
from pipeline.splits import split_of

ACCEPTED, LEFT_OUT = "accepted", "left_out"

_CAPTION = pa.struct([("text", pa.string()), ("language", pa.string())])
PIXELS = pa.schema(
    [
        ("key", pa.string()),
        ("group", pa.string()),
        ("style", pa.string()),
        ("split", pa.string()),
        ("image", pa.binary()),
        ("captions", pa.list_(_CAPTION)),
        ("source", pa.string()),
        ("license", pa.string()),
        ("attribution", pa.string()),
        ("shard", pa.string()),
    ]
)
STAGED = pa.schema(
    [
        *PIXELS,
        ("number", pa.int64()),  # place in the shard
        ("digest", pa.binary()),  # of the pixels
        ("looks", pa.uint64()),  # perceptual hash; null unless pictures are deduplicated by it
        ("outcome", pa.string()),  # accepted, left_out, or why the row is quarantined
    ]
)


@dataclass(frozen=True)
class Decoder:
    """Encoded samples -> STAGED rows.

    Attributes:
        groups: the groups that are wanted; None wants all.
        data: how groups are split.
        config: what a picture becomes and what is refused.
    """

    groups: frozenset[str] | None
    data: DataConfig
    config: PreprocessConfig

    def table(self, samples: Sequence[Mapping[str, Any]]) -> pa.Table:
        """reading.Samples -> a STAGED table."""
        return pa.Table.from_pylist([self.row(sample) for sample in samples], schema=STAGED)

    def row(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample's row; columns that its outcome leaves unknown are absent."""
        found = {name: sample[name] for name in ("key", "shard", "number")}
        config = self.config
        try:
            if sample["problem"] is not None:
                raise BadImage(sample["problem"])
            record = parse_record(sample["record"])
            if self.groups is not None and record["group"] not in self.groups:
                return found | {"outcome": LEFT_OUT}
            captions = self._captions(record.get("captions"))
            if sample["picture"] is None:
                raise BadImage("no_picture")
            pixels = decode(sample["picture"], config, key=sample["key"])
        except (BadCaption, BadImage) as error:
            return found | {"outcome": error.reason}
        image = pixels.tobytes()
        return found | {
            "outcome": ACCEPTED,
            "image": image,
            "digest": hashlib.blake2b(image, digest_size=16).digest(),
            "looks": perceptual_hash(pixels) if config.deduplicate == "perceptual" else None,
            "captions": [dataclasses.asdict(caption) for caption in captions],
            "split": split_of(
                record["group"],
                self.data.split_seed,
                self.data.validation_fraction,
                self.data.test_fraction,
            ),
            **{name: record[name] for name in TEXTS},
        }

    def _captions(self, raw: Any) -> tuple[Caption, ...]:
        """The captions in the languages that are wanted.

        Raises:
            BadCaption: as `captions_of`; other_language if none is left.
        """
        config = self.config
        if config.languages and isinstance(raw, list) and raw:
            raw = [caption for caption in raw if self._is_wanted(caption)]
            if not raw and config.require_captions:
                raise BadCaption("other_language")
        if raw == [] and not config.require_captions:
            return ()
        return captions_of(raw, config.max_caption_chars)

    def _is_wanted(self, caption: Any) -> bool:
        """Of a wanted language, or so malformed that it names none."""
        language = caption.get("language") if isinstance(caption, dict) else None
        return not isinstance(language, str) or speaks(language, self.config.languages)


def perceptual_hash(pixels: NDArray[np.uint8]) -> int:
    """uint8 (3, S, S) -> 64 bits that nearly agree where pictures look alike (pHash)."""
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


def parse_record(encoded: Any) -> dict[str, Any]:
    """A sample's JSON with every text field present, and none but the attribution empty.

    Raises:
        BadCaption: bad_utf8 or bad_json.
    """
    if not isinstance(encoded, bytes):
        raise BadCaption("bad_json")
    try:
        record = json.loads(encoded.decode("utf-8"))
        valid = isinstance(record, dict) and all(
            isinstance(record.get(name), str) and (record[name].encode() or name == "attribution")
            for name in TEXTS
        )
    except UnicodeError as error:
        raise BadCaption("bad_utf8") from error
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        raise BadCaption("bad_json") from error
    if not valid:
        raise BadCaption("bad_json")
    return dict(record)


def group_of(encoded: Any) -> str | None:
    """A record's group; None where the record is one that `Decoder` will quarantine."""
    try:
        return str(parse_record(encoded)["group"])
    except BadCaption:
        return None
