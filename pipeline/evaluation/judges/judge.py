"""What evaluation asks of a judge: images and captions in one space, where they can be compared.

    for judge in judges:
        similarity = judge.embed_images(images) @ judge.embed_captions(captions).T   # (N, M)

trained.py holds the judges that are trained on the data at hand, hub.py those that come pretrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from pipeline.evaluation.features import FeaturesIdentity


@runtime_checkable
class Judge(Protocol):
    """A model of how well an image fits a caption. No generator ever trains on one.

    Shapes: N images, M captions, E dimensions of the shared space.

    Attributes:
        name: short; names its metrics, as in "imagenet_r1".
        digest: sha256 of all that its embeddings depend on.
        trained_on: the pretrained image features that it sees through, by which
            `independence.check_independent` refuses to judge what was trained on them; None if it
            sees with weights that were trained on the data at hand alone.
    """

    name: str
    digest: str
    trained_on: FeaturesIdentity | None

    def embed_images(self, images: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) of any size -> float32 (N, E) on the CPU, l2-normalised; an image's
        row depends on that image alone."""
        ...

    def embed_captions(self, texts: Sequence[str]) -> Tensor:
        """M captions -> float32 (M, E) on the CPU, l2-normalised."""
        ...
