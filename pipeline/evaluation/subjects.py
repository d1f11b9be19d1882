"""What an evaluation measures: the floors and ceilings that need no generator, and bundles.

Each subject gives images for some of an evaluation set's captions. A subject is small and can be
sent to a worker, which opens it there: `images = subject.open().images(image_set, request)`.

    real         the real images: the best that a judge can be expected to say
    tokenizer    what image tokens leave of them: no generator of such tokens can be better
    blurred      the real images, blurred: what a judge that sees as people do must mark down
    shuffled     the real images against their neighbours' captions: chance
    NAME         a bundle's images

Shapes: N images, S pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from pipeline.bundles.bundle import load_generator
from pipeline.contracts import ImageGenerator
from pipeline.evaluation.eval_set import ImageSet
from pipeline.evaluation.samples import reconstruct, requests_for
from pipeline.images.degrade import blur
from pipeline.images.pixels import resize_batch, to_float, to_uint8
from pipeline.tokenizers._saved import load_tokenizer

BLUR_SHARE = 1 / 32
"""Standard deviation of the Gaussian blur of the subject "blurred", as a share of the side."""


@dataclass(frozen=True)
class Wanted:
    """Which images of a set are wanted.

    Attributes:
        language: of the captions.
        rows: their numbers within the set.
        guidance: None for the model's own guidance scale.
        seed: of the set's first image; image i has seed + i.
    """

    language: str
    rows: range
    guidance: float | None
    seed: int


Images = Callable[[ImageSet, Wanted], Tensor]
"""The wanted images of a set: uint8 (N, 3, S, S), where S is the size of the set's real images."""


class Subject(Protocol):
    """What is evaluated.

    Attributes:
        name: the subject's, unique within an evaluation.
        generates: whether its images are generated from captions: it has a speed, a size and
            further guidance scales.
        offset: image i is judged against the caption of image i + offset.
    """

    name: str
    generates: bool
    offset: int

    def open(self) -> Images:
        """Load what the subject needs."""
        ...

    def size_mb(self) -> float:
        """Megabytes of its files; 0 without any."""
        return 0.0


@dataclass(frozen=True)
class RealImages(Subject):
    """The real images; with an offset, against other images' captions."""

    name: str = "real"
    offset: int = 0
    generates: bool = False

    def open(self) -> Images:
        return lambda image_set, wanted: image_set.images[wanted.rows.start : wanted.rows.stop]


@dataclass(frozen=True)
class BlurredImages(Subject):
    """The real images behind a Gaussian blur of BLUR_SHARE of their side."""

    name: str = "blurred"
    offset: int = 0
    generates: bool = False

    def open(self) -> Images:
        def images(image_set: ImageSet, wanted: Wanted) -> Tensor:
            real = image_set.images[wanted.rows.start : wanted.rows.stop]
            return to_uint8(blur(to_float(real), BLUR_SHARE * real.shape[-1]))

        return images


@dataclass(frozen=True)
class ReconstructedImages(Subject):
    """The real images, encoded as image tokens and decoded."""

    tokenizer: Path
    name: str = "tokenizer"
    offset: int = 0
    generates: bool = False

    def open(self) -> Images:
        tokenizer = load_tokenizer(self.tokenizer)

        def images(image_set: ImageSet, wanted: Wanted) -> Tensor:
            real = image_set.images[wanted.rows.start : wanted.rows.stop]
            return reconstruct(tokenizer, real, len(real))

        return images


@dataclass(frozen=True)
class BundleImages(Subject):
    """The images that a bundle's generator makes of the captions."""

    name: str
    bundle: Path
    pretrained_cache: Path
    offset: int = 0
    generates: bool = True

    def open(self) -> Images:
        return images_of(load_generator(self.bundle, pretrained_cache=self.pretrained_cache))

    def size_mb(self) -> float:
        """Of the whole bundle."""
        return sum(f.stat().st_size for f in self.bundle.rglob("*") if f.is_file()) / 1e6


def images_of(generator: ImageGenerator) -> Images:
    """A generator's images, in the size of the real ones: two models may differ in theirs."""

    def images(image_set: ImageSet, wanted: Wanted) -> Tensor:
        requests = requests_for(
            image_set, wanted.language, generator.styles, seed=wanted.seed,
            guidance_scale=wanted.guidance,
        )  # fmt: skip
        drawn = generator.generate(requests[wanted.rows.start : wanted.rows.stop]).cpu()
        return resize_batch(drawn, image_set.images.shape[-1])

    return images
