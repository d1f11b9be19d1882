"""Images for a person to look at: samples of a shard set, and what augmentation does to them.

Run:

    tessera data show home:cats --out cats.png
    tessera data augment emoji-base --out augment.png
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from jobs.options import image_format
from pipeline.config import AugmentConfig, PreprocessConfig, Recipe
from pipeline.data.preprocess.decode import BadImage, decode
from pipeline.data.preprocess.rows import parse_record
from pipeline.data.shards.captions import BadCaption, clean
from pipeline.data.shards.files import open_patiently
from pipeline.data.shards.manifest import Manifest, locate, open_shards, read_manifest
from pipeline.data.shards.records import record_of
from pipeline.data.shards.tars import TarSample, read_samples
from pipeline.errors import DataError
from pipeline.images.augment import Augment
from pipeline.images.grid import grid
from pipeline.images.mirror import may_mirror
from pipeline.images.pixels import WHITE
from pipeline.models import load_family

SIDE = 144  # pixels per side of an image on a contact sheet
EFFECT_SIDE = 96  # at least, on a grid of effects
COLUMNS = 6  # of a contact sheet
STRENGTHS = {
    "flip": 1.0, "zoom": 0.3, "rotate": 20.0, "random_crop": 0.4, "ten_crop": 0.75, "shift": 10,
    "color": 1.0, "swap_channels": 1.0, "blur": 1.0, "noise": 0.2, "cutout": 0.5, "mixup": 1.0,
    "cutmix": 1.0,
}  # fmt: skip
"""With which an effect is shown that the recipe does not use."""
PROBABILITIES = ("flip", "swap_channels", "blur", "mixup", "cutmix")
"""Effects whose setting is a probability; they are shown with 1, on every image allowed."""


def contact_sheet(uri: str, out: Path, *, count: int = 48) -> Manifest:
    """Write an image of up to `count` images with their captions, spread over the set's shards.

    An image that cannot be read is grey, with the reason below it.

    Returns:
        The set's manifest.

    Raises:
        DataError: no shard set, or a shard that cannot be read.
        ResourceError: `out` cannot be written, or names no format of images.
    """
    written_as = image_format(out)
    manifest = read_manifest(uri)
    cells = [_cell(sample, manifest) for sample in _spread(uri, manifest, count)]
    images, captions = zip(*cells, strict=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet = grid(np.stack(images), min(COLUMNS, len(images)), captions=captions)
    sheet.save(out, format=written_as)
    return manifest


def augmentation_grid(
    recipe: Recipe, home: Path, out: Path, *, count: int = 8, seed: int = 0
) -> None:
    """Write an image of a recipe's images, one row per effect, then one per augment section.

    An effect that the recipe uses in a section has the largest of its settings, the others have
    those of STRENGTHS. Effects of PROBABILITIES are shown on every image that may have them.

    Args:
        recipe: its first shard set is read.
        home: where home:NAME lies.
        out: the image file to write.
        count: images, the columns.
        seed: of the changes.

    Raises:
        DataError: no shard set, or no image in it that can be read.
        ResourceError: `out` cannot be written, or names no format of images.
    """
    written_as = image_format(out)
    uri = locate(recipe.data.shards[0], home)
    images, flippable = _images(uri, recipe.preprocess, count)
    sections = _augment_sections(recipe)
    rows = {"as it is": images}
    seeds = seed + torch.arange(len(images))
    for name, config in {**_effects(list(sections.values())), **sections}.items():
        rows[name] = Augment(config)(images, seeds=seeds, flippable=flippable)
    out.parent.mkdir(parents=True, exist_ok=True)
    scale = max(1, EFFECT_SIDE // recipe.preprocess.image_size)
    stacked = torch.cat(list(rows.values()))
    grid(stacked, len(images), row_labels=tuple(rows), scale=scale).save(out, format=written_as)


def _images(uri: str, config: PreprocessConfig, count: int) -> tuple[Tensor, Tensor]:
    """Up to `count` images of a set, uint8 (B, 3, S, S), and whether each may be mirrored, bool.

    Raises:
        DataError: no image can be read.
    """
    manifest = read_manifest(uri)
    images, flippable = [], []
    for sample in _spread(uri, manifest, 4 * count):
        try:
            record = _record(sample, manifest)
            images.append(decode(sample.image or b"", config, key=sample.key))
            flippable.append(may_mirror([caption["text"] for caption in record["captions"]]))
        except (BadImage, BadCaption):
            continue
    if not images:
        raise DataError(f"{uri} has no picture that can be read: see `tessera data show {uri}`")
    step = max(1, len(images) // count)
    chosen = torch.from_numpy(np.stack(images[::step][:count]))
    return chosen, torch.tensor(flippable[::step][:count])


def _augment_sections(recipe: Recipe) -> dict[str, AugmentConfig]:
    """By name, the recipe's sections whose augmentation has an effect."""
    sections = {
        "tokenizer.train": recipe.tokenizer.train.augment,
        "encode": recipe.encode.augment,
        "aligner.train": recipe.aligner.train.augment,
    }
    if load_family(recipe.generator.family).reads == "images":
        sections["generator.train"] = recipe.generator.train.augment
    return sections


def _effects(sections: list[AugmentConfig]) -> dict[str, AugmentConfig]:
    """By label, each effect alone; the label is in brackets if no section uses it."""
    found = {}
    for name, default in STRENGTHS.items():
        used = max(getattr(section, name) for section in sections)
        alone = {"flip": 0.0, name: 1.0 if name in PROBABILITIES else used or default}
        label = f"{name}={used:g}" if used else f"({name}={default:g})"
        found[label] = AugmentConfig.model_validate(alone)
    return found


def _record(sample: TarSample, manifest: Manifest) -> dict[str, Any]:
    """A sample's captions and credits, from its JSON or from a foreign tar's files.

    Raises:
        BadCaption: they cannot be read.
    """
    if manifest.in_place is None:
        return parse_record(sample.files.get("json"))
    there = manifest.in_place
    return record_of(sample.key, sample.files, there, there.members)[0]


def _spread(uri: str, manifest: Manifest, count: int) -> Iterator[TarSample]:
    """Up to `count` samples from the beginnings of evenly chosen shards, in the set's order."""
    fs, root = open_shards(uri, manifest)
    chosen = min(len(manifest.shards), count)
    places = np.linspace(0, len(manifest.shards) - 1, chosen).round().astype(int)
    for i, place in enumerate(places):
        share = count // chosen + (i < count % chosen)
        shard = manifest.shards[place]
        step = max(1, min(shard.samples // share, 16))
        with open_patiently(fs, f"{root}/{shard.file}") as stream:
            members = manifest.in_place.members if manifest.in_place is not None else None
            samples = read_samples(stream, name=shard.file, members=members)
            yield from islice(samples, 0, share * step, step)


def _cell(sample: TarSample, manifest: Manifest) -> tuple[NDArray[np.uint8], str]:
    """An image, uint8 (3, SIDE, SIDE), and the text below it."""
    config = PreprocessConfig(image_size=SIDE, min_side=1, max_aspect=1e6)
    try:
        record = _record(sample, manifest)
        if sample.problem or sample.image is None:
            raise BadImage(sample.problem or "no_picture")
        first = {c["language"]: c["text"] for c in reversed(record["captions"])}
        captions = list(reversed(first.values()))  # the first of a language is the shortest
        return decode(sample.image, config), clean(" | ".join(captions)) or sample.key
    except (BadImage, BadCaption) as error:
        return np.full((3, SIDE, SIDE), WHITE[0] // 2, np.uint8), f"({error.reason})"
