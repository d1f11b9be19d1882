"""Looking at data: shard sets, and what augmentation does to pictures.

Run:

    tessera data verify home:cats
    tessera data show home:cats --out cats.png
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.captions import BadCaption
from pipeline.config import PreprocessConfig
from pipeline.decoding import parse_record
from pipeline.images import WHITE, BadPicture, decode, grid
from pipeline.records import record_of
from pipeline.shards import Manifest, open_shards, read_manifest
from pipeline.storage import open_patiently
from pipeline.tars import TarSample, read_samples

SIDE = 96  # pixels a picture on a contact sheet
COLUMNS = 8


def contact_sheet(uri: str, out: Path, *, count: int = 48) -> Manifest:
    """Write a PNG of up to `count` pictures with their captions, spread over the set's shards.

    A picture that cannot be read is grey, with its reason below.

    Raises:
        DataError: no shard set, or a shard that cannot be read.
    """
    manifest = read_manifest(uri)
    cells = [_cell(sample, manifest) for sample in _spread(uri, manifest, count)]
    images, captions = zip(*cells, strict=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    grid(np.stack(images), min(COLUMNS, len(images)), captions=captions).save(out)
    return manifest


def _spread(uri: str, manifest: Manifest, count: int) -> Iterator[TarSample]:
    """The first samples of evenly chosen shards, in the set's order."""
    fs, root = open_shards(uri, manifest)
    chosen = min(len(manifest.shards), count)
    places = np.linspace(0, len(manifest.shards) - 1, chosen).round().astype(int)
    for i, place in enumerate(places):
        share = count // chosen + (i < count % chosen)
        shard = manifest.shards[place]
        step = max(1, min(shard.samples // share, 16))
        with open_patiently(fs, f"{root}/{shard.file}") as stream:
            yield from islice(read_samples(stream, name=shard.file), 0, share * step, step)


def _cell(sample: TarSample, manifest: Manifest) -> tuple[NDArray[np.uint8], str]:
    """A picture uint8 (3, SIDE, SIDE) and what to write below it."""
    config = PreprocessConfig(image_size=SIDE, min_side=1, max_aspect=1e6)
    try:
        if manifest.in_place is None:
            record = parse_record(sample.files.get("json"))
        else:
            record = record_of(sample.key, sample.files, manifest.in_place)
        if sample.problem or sample.picture is None:
            raise BadPicture(sample.problem or "no_picture")
        captions = [caption["text"] for caption in record["captions"]]
        return decode(sample.picture, config), " | ".join(captions) or sample.key
    except (BadPicture, BadCaption) as error:
        return np.full((3, SIDE, SIDE), WHITE[0] // 2, np.uint8), f"({error.reason})"
