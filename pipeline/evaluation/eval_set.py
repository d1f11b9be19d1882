"""The real images and captions that generators are evaluated on, the same ones for all of them.

    eval_set = EvalSet.from_parquet(pixels, recipe.evaluate, image_size=64)

There are two sets per style: "seen" is taken from the training split, "unseen" from the test split.
Within a set no two images are of the same subject or share a caption, so that retrieval has one
right answer. The choice depends on the data and the recipe's seed alone.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.config import EvaluateConfig, ImageFilter
from pipeline.data.preprocess.store import fixed_width, read_table
from pipeline.errors import DataError

logger = logging.getLogger(__name__)

SPLITS = {"seen": "train", "unseen": "test"}
MIN_IMAGES = 8


@dataclass(frozen=True)
class ImageSet:
    """N real images of one style, and M >= N captions for retrieval to choose from.

    Attributes:
        name: "seen" or "unseen".
        style: of the images.
        keys: N unique names, in the order of the images.
        images: uint8 (N, 3, S, S).
        captions: M by language; the first N are the images' own, the others are distractors.
    """

    name: str
    style: str
    keys: tuple[str, ...]
    images: Tensor
    captions: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class EvalSet:
    """All image sets, those of the gated style first: the one that the promotion gate reads.

    Attributes:
        sets: two per style, seen and unseen.
        training: the training split's images by style, uint8 (T, 3, S, S), to find copies of.
        training_keys: their names, in the same order.
        languages: of the captions; the promotion gate reads the first.
    """

    sets: tuple[ImageSet, ...]
    training: Mapping[str, Tensor]
    training_keys: Mapping[str, tuple[str, ...]]
    languages: tuple[str, ...]

    @property
    def style(self) -> str:
        """The gated style."""
        return self.sets[0].style

    @property
    def digest(self) -> str:
        """Identifies the choice of images: reports with the same digest can be compared."""
        names = "\n".join(f"{s.style}/{s.name}/{key}" for s in self.sets for key in s.keys)
        return hashlib.sha256(names.encode()).hexdigest()

    @classmethod
    def from_parquet(cls, directory: Path, config: EvaluateConfig, *, image_size: int) -> EvalSet:
        """Choose from preprocessed images.

        Args:
            directory: the output of preprocessing.
            config: styles, languages, sizes and the seed.
            image_size: S of the preprocessed images.

        Raises:
            DataError: a style, a split or a language has too few images.
        """
        styles = config.styles or _styles(directory)
        tables = {
            (style, split): _read(directory, style, split)
            for style in styles
            for split in SPLITS.values()
        }
        languages, choices = _choose(tables, styles, config)
        warn_of_languages(config.languages, languages)
        sets = [_image_set(choice, tables, image_size) for choice in choices]
        training = {style: _pixels(tables[style, SPLITS["seen"]], image_size) for style in styles}
        names = {s: tuple(tables[s, SPLITS["seen"]]["key"].to_pylist()) for s in styles}
        return cls(tuple(sets), training, names, languages)


def check_enough(table: pa.Table, config: EvaluateConfig) -> tuple[str, ...]:
    """Check that evaluation will find its images; no pixels are read.

    Args:
        table: "style", "split", "group" and "captions" of all captioned images.
        config: styles, languages, sizes and the seed.

    Returns:
        The languages that will be evaluated.

    Raises:
        DataError: as for `EvalSet.from_parquet`.
    """
    styles = config.styles or tuple(sorted(set(table["style"].to_pylist())))
    tables = {
        (style, split): table.filter(
            pc.and_(pc.equal(table["style"], style), pc.equal(table["split"], split))
        )
        for style in styles
        for split in SPLITS.values()
    }
    return _choose(tables, styles, config)[0]


def _styles(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(set(read_table(directory, columns=["style"])["style"].to_pylist())))


def _read(directory: Path, style: str, split: str) -> pa.Table:
    columns = ["group", "image", "captions"]
    image_filter = ImageFilter(styles=(style,))
    return read_table(
        directory, split=split, image_filter=image_filter, columns=columns, captioned=True
    )


def _languages(tables: Sequence[pa.Table], wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted languages that most images have a caption in.

    Raises:
        DataError: none of them; the message lists what there is.
    """
    found: Counter[str] = Counter()
    for table in tables:
        for captions in table["captions"].to_pylist():
            found.update({caption["language"] for caption in captions})
    most = sum(table.num_rows for table in tables) / 2
    kept = tuple(language for language in wanted if found[language] > most)
    if not kept:
        raise DataError(
            f"most pictures have no caption in {', '.join(wanted)}; their captions are in "
            f"{', '.join(sorted(found))}: set evaluate.languages"
        )
    return kept


def warn_of_languages(wanted: Sequence[str], kept: Sequence[str]) -> None:
    """Log which of the wanted languages are not evaluated."""
    if left_out := [language for language in wanted if language not in kept]:
        logger.warning(
            f"not evaluated in {', '.join(left_out)}, in which most pictures have no caption "
            f"(evaluate.languages); the gate reads the captions in {kept[0]}"
        )


def num_other_images(config: EvaluateConfig) -> int:
    """Images per set of the other styles, and of the gated style in the other languages."""
    return config.num_other_images or config.num_images


@dataclass(frozen=True)
class _Choice:
    """Which rows of a style's split are a set, with the captions that go with it."""

    name: str
    style: str
    rows: list[int]
    captions: dict[str, list[str]]


Tables = Mapping[tuple[str, str], pa.Table]
"""The captioned images by style and split, each sorted by key."""


def _choose(
    tables: Tables, styles: Sequence[str], config: EvaluateConfig
) -> tuple[tuple[str, ...], list[_Choice]]:
    """The languages and the rows of every set; if those are fewer than are wanted, captions of the
    style's other split fill up as distractors.

    Raises:
        DataError: fewer than MIN_IMAGES of a set differ in subject and captions.
    """
    languages = _languages(list(tables.values()), config.languages)
    choices = []
    for style in styles:
        enough = config.num_images if style == styles[0] else num_other_images(config)
        for name, split in SPLITS.items():
            rng = np.random.default_rng((config.seed, zlib.crc32(f"{style}/{name}".encode())))
            picker = _Picker(languages, enough, rng)
            table = tables[style, split]
            rows = picker.take(table)
            if len(rows) < MIN_IMAGES:
                raise DataError(
                    f"only {len(rows)} of {table.num_rows} {name} pictures of style {style!r} "
                    f"differ in subject and captions, at least {MIN_IMAGES} are needed: give more "
                    "data or another evaluate.styles"
                )
            for other in SPLITS.values():
                if other != split:
                    picker.take(tables[style, other])
            choices.append(_Choice(name, style, rows, picker.captions))
    return languages, choices


def _image_set(choice: _Choice, tables: Tables, image_size: int) -> ImageSet:
    chosen = tables[choice.style, SPLITS[choice.name]].take(choice.rows)
    return ImageSet(
        name=choice.name,
        style=choice.style,
        keys=tuple(chosen["key"].to_pylist()),
        images=_pixels(chosen, image_size),
        captions={language: tuple(texts) for language, texts in choice.captions.items()},
    )


class _Picker:
    """Takes rows in random order until there are enough, never two of the same group or with a
    caption in common.

    Attributes:
        captions: of the rows taken, in their order, by language.
    """

    def __init__(self, languages: tuple[str, ...], enough: int, rng: np.random.Generator) -> None:
        self.enough, self.rng = enough, rng
        self.groups: set[str] = set()
        self.captions: dict[str, list[str]] = {language: [] for language in languages}

    def take(self, table: pa.Table) -> list[int]:
        """Take rows of this table; their indices, in the order of their captions."""
        groups, captions = table["group"].to_pylist(), table["captions"].to_pylist()
        taken = []
        for row in self.rng.permutation(table.num_rows).tolist():
            if len(self.groups) == self.enough:
                break
            if self._accept(groups[row], captions[row]):
                taken.append(row)
        return taken

    def _accept(self, group: str, captions: list[dict[str, Any]]) -> bool:
        canonical: dict[str, str] = {}
        for caption in captions:
            canonical.setdefault(caption["language"], caption["text"])
        if group in self.groups or any(
            language not in canonical or canonical[language] in texts
            for language, texts in self.captions.items()
        ):
            return False
        self.groups.add(group)
        for language, texts in self.captions.items():
            texts.append(canonical[language])
        return True


def _pixels(table: pa.Table, image_size: int) -> Tensor:
    shape = (3, image_size, image_size)
    return torch.from_numpy(fixed_width(table["image"], np.uint8, shape).copy())
