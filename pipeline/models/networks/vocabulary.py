"""Token ids of the causal family: where image tokens and markers lie in the grown vocabulary.

vocabulary = ImageVocabulary(text_size=49_152, codebook_size=4_375, num_styles=16)
vocabulary.begin, vocabulary.size        # 4375, 53545
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Ids = TypeVar("Ids", int, Tensor)


@dataclass(frozen=True)
class ImageVocabulary:
    """The new tokens, numbered from 0, in this order: the image tokens, the begin marker, one
    marker per style, the marker for no style; and for models that see source images, a marker
    before a source image and one that stands for a missing token of it.

    In the joined vocabulary, ids of new tokens come after the text tokens' ids: text_size is added.

    Attributes:
        text_size: number of the language model's own tokens.
        codebook_size: number of image tokens.
        num_styles: number of style markers.
        with_source: whether the model sees source images.
    """

    text_size: int
    codebook_size: int
    num_styles: int
    with_source: bool = False

    @property
    def begin(self) -> int:
        """The marker before the first image token."""
        return self.codebook_size

    def style(self, style: Ids) -> Ids:
        """The marker of a style id; of num_styles, the marker for no style."""
        return self.codebook_size + 1 + style

    @property
    def source(self) -> int:
        """The marker before a source image."""
        return self.style(self.num_styles) + 1

    @property
    def hole(self) -> int:
        """The marker that stands for a missing token of a source image."""
        return self.style(self.num_styles) + 2

    @property
    def num_new(self) -> int:
        """Number of new tokens."""
        return self.codebook_size + 2 + self.num_styles + 2 * self.with_source

    @property
    def size(self) -> int:
        """Number of tokens in the joined vocabulary."""
        return self.text_size + self.num_new

    def layout(self, styles: Sequence[str]) -> dict[str, Any]:
        """Ids in the joined vocabulary by name, for programs that load an exported model."""
        sources = {
            "source_marker": self.text_size + self.source,
            "hole_marker": self.text_size + self.hole,
        }
        return {
            **(sources if self.with_source else {}),
            "first_image_token": self.text_size,
            "codebook_size": self.codebook_size,
            "begin_marker": self.text_size + self.begin,
            "style_markers": {s: self.text_size + self.style(i) for i, s in enumerate(styles)},
            "no_style_marker": self.text_size + self.style(self.num_styles),
        }
