"""Where image tokens and markers lie in a language model's grown vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

Ids = TypeVar("Ids", int, Tensor)


@dataclass(frozen=True)
class ImageVocabulary:
    """New tokens are numbered from 0: image tokens, the begin marker, a marker a style and one for
    no style. In the joined vocabulary they follow the text's tokens.

    Attributes:
        text_size: the language model's own tokens.
        codebook_size: image tokens.
        num_styles: places for styles.
    """

    text_size: int
    codebook_size: int
    num_styles: int

    @property
    def begin(self) -> int:
        """The marker before the first image token."""
        return self.codebook_size

    def style(self, style: Ids) -> Ids:
        """A style's marker; num_styles stands for no style."""
        return self.codebook_size + 1 + style

    @property
    def num_new(self) -> int:
        return self.codebook_size + 2 + self.num_styles

    @property
    def size(self) -> int:
        """Of the joined vocabulary."""
        return self.text_size + self.num_new

    def layout(self, styles: Sequence[str]) -> dict[str, Any]:
        """Ids in the joined vocabulary, for other programs."""
        return {
            "first_image_token": self.text_size,
            "codebook_size": self.codebook_size,
            "begin_marker": self.text_size + self.begin,
            "style_markers": {s: self.text_size + self.style(i) for i, s in enumerate(styles)},
            "no_style_marker": self.text_size + self.style(self.num_styles),
        }
