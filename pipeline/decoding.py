"""One sample of a shard -> one row of pixels, or the reason why not.

Ray Data has no error handling by row (one bad picture costs its whole block), so `Decoder` catches
what a bad sample raises and writes it down as the row's outcome.

    rows = dataset.map_batches(Decoder(labels, None, data, config), batch_format="pandas")
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipeline.captions import BadCaption, captions_of
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.images import BadPicture, decode
from pipeline.splits import split_of

ACCEPTED, LEFT_OUT = "accepted", "left_out"
EXTENSIONS = ("webp", "png", "jpg", "jpeg")
TEXTS = ("group", "style", "source", "license", "attribution")

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
# digest: of the pixels; outcome: accepted, left_out, or why the row is quarantined
STAGED = PIXELS.append(pa.field("digest", pa.binary())).append(pa.field("outcome", pa.string()))


@dataclass(frozen=True)
class Decoder:
    """A batch of encoded samples -> a STAGED table, a row a sample.

    Attributes:
        labels: a shard's name in the tables, by the path Ray Data reports.
        groups: the groups that are wanted; None wants all.
        data: how groups are split.
        config: what a picture becomes and what is refused.
    """

    labels: Mapping[str, str]
    groups: frozenset[str] | None
    data: DataConfig
    config: PreprocessConfig

    def __call__(self, batch: Any) -> pa.Table:
        """`batch`: a pandas frame of `read_webdataset(decoder=None)`."""
        rows = [self.row(sample) for sample in batch.to_dict("records")]
        return pa.Table.from_pylist(rows, schema=STAGED)

    def row(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        """One sample's row; columns that its outcome leaves unknown are absent."""
        found = {"key": sample["__key__"], "shard": self.labels[sample["__url__"]]}
        try:
            record = parse_record(sample.get("json"))
            if self.groups is not None and record["group"] not in self.groups:
                return found | {"outcome": LEFT_OUT}
            captions = captions_of(record.get("captions"), self.config.max_caption_chars)
            image = decode(picture_of(sample), self.config).tobytes()
        except (BadCaption, BadPicture) as error:
            return found | {"outcome": error.reason}
        return found | {
            "outcome": ACCEPTED,
            "image": image,
            "digest": hashlib.blake2b(image, digest_size=16).digest(),
            "captions": [dataclasses.asdict(caption) for caption in captions],
            "split": split_of(
                record["group"],
                self.data.split_seed,
                self.data.validation_fraction,
                self.data.test_fraction,
            ),
            **{name: record[name] for name in TEXTS},
        }


def parse_record(encoded: Any) -> dict[str, Any]:
    """A sample's JSON with every text field present.

    Raises:
        BadCaption: bad_utf8 or bad_json.
    """
    if not isinstance(encoded, bytes):
        raise BadCaption("bad_json")
    try:
        record = json.loads(encoded.decode("utf-8"))
        valid = isinstance(record, dict) and all(
            isinstance(record.get(name), str) and record[name].encode() for name in TEXTS
        )
    except UnicodeError as error:
        raise BadCaption("bad_utf8") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise BadCaption("bad_json") from error
    if not valid:
        raise BadCaption("bad_json")
    return dict(record)


def picture_of(sample: Mapping[str, Any]) -> bytes:
    """The encoded picture; a pandas batch fills other samples' columns with None or NaN.

    Raises:
        BadPicture: there is none.
    """
    for extension in EXTENSIONS:
        encoded = sample.get(extension)
        if isinstance(encoded, bytes):
            return encoded
    raise BadPicture("no_picture")


def group_of(encoded: Any) -> str | None:
    """A record's group; None where the record is one that `Decoder` will quarantine."""
    try:
        return str(parse_record(encoded)["group"])
    except BadCaption:
        return None
