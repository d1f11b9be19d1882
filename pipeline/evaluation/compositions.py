"""Compositions: a fixed set of prompts that are in no training set, and scorers of their images.

"a green dog", "three stars", "一只紫色的兔子": a model that only recalls its training images draws
none of them. Each prompt of compositions.yaml is in English and in Chinese.

    entries = compositions()
    requests = composition_requests(languages=("en", "zh"), style="noto", seed=0)
    images, _ = generate_images(generator, requests, batch_size=50)
    scores = score_compositions(images, entries * 2)   # {"colour": (40,), "count": (32,), ...}

The scorers look at pixels alone, on a white background. They see how much of an image is green, not
whether it is a dog; how many things lie apart from each other, not whether they are stars; where a
red thing is from a blue one, not whether those are circle and square. A green blob is a perfect
green dog to them, and two apples that touch are one thing. So they say something of a model only
beside its alignment with captions, and the grid beside both.

Shapes: N images or entries, H x W pixels, uint8 with 3 channels (RGB) first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from scipy import ndimage
from torch import Tensor

from pipeline.config.section import Config
from pipeline.contracts import GenerationRequest
from pipeline.images.pixels import to_pil

LANGUAGES = ("en", "zh")
"""Of every composition."""

Colour = Literal[
    "red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey"
]
Mask = NDArray[np.bool_]

NEAR_WHITE = 235
"""The least channel of a background pixel."""
SMALLEST_THING = 0.005
"""Share of the image's pixels, below which a component is a speck."""
SMALLEST_OF_ALL = 0.2
"""Share of the largest component, below which another is a part that came off."""
LEAST_COLOUR = 0.1
"""Share of the foreground, below which a colour is not there."""
LEAST_OFFSET = 0.1
"""Share of the image's side by which things must lie apart to be one above the other."""

RANGES: dict[Colour, tuple[tuple[int, int, float, float, float, float], ...]] = {
    "red": ((345, 370, 0.5, 1.0, 0.4, 1.0), (350, 377, 0.7, 1.0, 0.5, 1.0)),
    "orange": ((13, 42, 0.55, 1.0, 0.8, 1.0),),
    "yellow": ((38, 62, 0.3, 1.0, 0.65, 1.0),),
    "green": ((60, 172, 0.2, 1.0, 0.2, 1.0), (50, 60, 0.3, 1.0, 0.2, 0.65)),
    "blue": ((172, 255, 0.2, 1.0, 0.25, 1.0),),
    "purple": ((250, 320, 0.12, 1.0, 0.25, 1.0),),
    "pink": ((300, 372, 0.12, 0.6, 0.8, 1.0), (310, 350, 0.5, 1.0, 0.75, 1.0)),
    "brown": ((0, 45, 0.25, 1.0, 0.2, 0.65), (8, 45, 0.25, 0.7, 0.6, 0.8)),
    "black": ((0, 360, 0.0, 1.0, 0.0, 0.25), (0, 360, 0.0, 0.4, 0.0, 0.4)),
    "white": ((0, 360, 0.0, 0.12, 0.8, 1.0),),
    "grey": ((0, 360, 0.0, 0.2, 0.3, 0.88),),
}
"""Boxes of hue in degrees (beyond 360 it begins again), saturation and value, 0 to 1, from and up
to. Colours overlap where people disagree."""


# ---- What a composition expects ------------------------------------------------------------------


class Colours(Config):
    """Everything in one colour, or one thing in each of several: the least share of the foreground
    that has a colour, times the number of colours, at most 1."""

    colours: tuple[Colour, ...] = Field(min_length=1)

    def score(self, view: View) -> float:
        shares = [view.share(colour) for colour in self.colours]
        return min(1.0, len(shares) * min(shares))


class Count(Config):
    """A number of things that do not touch: 1 if there are so many components, else 0."""

    count: int = Field(ge=1)

    def score(self, view: View) -> float:
        return float(len(view.things) == self.count)


class Relation(Config):
    """Where one thing is from another, told apart by their colours: 1 if each colour is mainly in
    a thing of its own, and the first's centre lies on that side of the second's; else 0."""

    first: Colour
    relation: Literal["above", "below", "left of", "right of"]
    second: Colour

    def score(self, view: View) -> float:
        first, second = view.thing_of(self.first), view.thing_of(self.second)
        if first is None or second is None or first == second:
            return 0.0
        down, right = np.subtract(view.centre(first), view.centre(second))
        offset = {"above": -down, "below": down, "left of": -right, "right of": right}
        return float(offset[self.relation] >= LEAST_OFFSET)


class Composition(Config):
    """One prompt.

    Attributes:
        id: unique name.
        kind: what is composed.
        en, zh: the prompt in each language.
        expect: what its image must have, as far as pixels tell; None where they do not.
    """

    id: str
    kind: Literal["colour", "pair", "count", "relation", "attribute"]
    en: str
    zh: str
    expect: Colours | Count | Relation | None = None

    def prompt(self, language: str) -> str:
        """In one of `LANGUAGES`.

        Raises:
            ValueError: in another.
        """
        if language not in LANGUAGES:
            raise ValueError(f"compositions are in {', '.join(LANGUAGES)}, not in {language!r}")
        text: str = getattr(self, language)
        return text


@cache
def compositions() -> tuple[Composition, ...]:
    """All of them, in the order of compositions.yaml."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return tuple(Composition.model_validate(entry) for entry in yaml.safe_load(text))


# ---- Asking for them, and scoring what came ------------------------------------------------------


def composition_requests(
    entries: Sequence[Composition] | None = None,
    *,
    languages: Iterable[str] = LANGUAGES,
    style: str | None = None,
    seed: int = 0,
) -> list[GenerationRequest]:
    """One request per language and entry, all of one language after the other's.

    Args:
        entries: by default all `compositions`; entry i is seeded seed + i in every language.
        languages: of `LANGUAGES`.
        style: one of the generator's, or None for whichever the model prefers.

    Raises:
        ValueError: a language is another.
    """
    entries = compositions() if entries is None else entries
    return [
        GenerationRequest(entry.prompt(language), seed=seed + i, style=style)
        for language in languages
        for i, entry in enumerate(entries)
    ]


def score_composition(entry: Composition, image: Tensor | NDArray[np.uint8]) -> float:
    """How well an image, uint8 (3, H, W), has what the entry expects: 0 to 1; NaN where no scorer
    can tell."""
    return math.nan if entry.expect is None else entry.expect.score(View(image))


def score_compositions(
    images: Tensor | NDArray[np.uint8], entries: Sequence[Composition]
) -> dict[str, NDArray[np.float64]]:
    """The scores of images (N, 3, H, W) of N entries by kind, in their order; the kind
    "attribute", which no scorer can tell, is left out.

    Raises:
        ValueError: images and entries differ in number.
    """
    if len(images) != len(entries):
        raise ValueError(f"{len(images)} images of {len(entries)} compositions")
    scores: dict[str, list[float]] = {}
    for image, entry in zip(images, entries, strict=True):
        if entry.expect is not None:
            scores.setdefault(entry.kind, []).append(score_composition(entry, image))
    return {kind: np.array(values) for kind, values in scores.items()}


# ---- Pixels --------------------------------------------------------------------------------------


class View:
    """An image, uint8 (3, H, W), as foreground and colours.

    Attributes:
        foreground: what is no background, bool (H, W). The background is what is nearly white and
            connected to the image's edge; white that is enclosed, as in an eye, is foreground.
        inner: the foreground without its outermost pixels, which blend with the background, unless
            nothing is left.
        things: the numbers of the foreground's connected parts, diagonals included, but for specks
            and what came off a larger one.
    """

    def __init__(self, image: Tensor | NDArray[np.uint8]) -> None:
        pixels = to_pil(image)
        self.foreground = ~_connected_to_edge(np.asarray(pixels).min(2) >= NEAR_WHITE)
        inner = ndimage.binary_erosion(self.foreground, border_value=1)
        self.inner: Mask = inner if inner.any() else self.foreground
        self._hsv = _hsv(pixels)
        self._labels, _ = ndimage.label(self.foreground, structure=np.ones((3, 3)))
        areas = np.bincount(self._labels.ravel())
        areas[0] = 0
        least = max(SMALLEST_THING * self._labels.size, SMALLEST_OF_ALL * areas.max())
        self.things = tuple(np.flatnonzero(areas >= least).tolist())

    def where(self, colour: Colour) -> Mask:
        """The inner pixels of a colour, bool (H, W)."""
        hue, saturation, value = self._hsv
        found = np.zeros_like(self.inner)
        for h, h_end, s, s_end, v, v_end in RANGES[colour]:
            found |= (
                ((hue - h) % 360 <= h_end - h)
                & (s <= saturation)
                & (saturation <= s_end)
                & (v <= value)
                & (value <= v_end)
            )
        return found & self.inner

    def share(self, colour: Colour) -> float:
        """The share of the inner pixels that have a colour; 0 if there are none."""
        return float(self.where(colour).sum() / max(self.inner.sum(), 1))

    def thing_of(self, colour: Colour) -> int | None:
        """The thing that has most of a colour's pixels; None if the colour or the thing is too
        small."""
        if self.share(colour) < LEAST_COLOUR:
            return None
        thing = int(np.bincount(self._labels[self.where(colour)]).argmax())
        return thing if thing in self.things else None

    def centre(self, thing: int) -> tuple[float, float]:
        """The mean row and column of a thing's pixels, as shares of the image's sides."""
        rows, columns = np.nonzero(self._labels == thing)
        height, width = self._labels.shape
        return float(rows.mean() / height), float(columns.mean() / width)


def _connected_to_edge(mask: Mask) -> Mask:
    """The parts of a mask that touch the image's edge, bool (H, W)."""
    labels, _ = ndimage.label(mask)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    connected: Mask = np.isin(labels, edge[edge > 0])
    return connected


def _hsv(image: Image.Image) -> tuple[NDArray[np.float64], ...]:
    """Hue in degrees, saturation and value, 0 to 1, each (H, W)."""
    h, s, v = np.moveaxis(np.asarray(image.convert("HSV"), dtype=float) / 255, 2, 0)
    return h * 360, s, v
