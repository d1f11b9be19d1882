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
    no style; where source pictures are seen, a marker before them and one for each hole in them.
    In the joined vocabulary they follow the text's tokens.

    Attributes:
        text_size: the language model's own tokens.
        codebook_size: image tokens.
        num_styles: places for styles.
        with_source: whether source pictures are seen.
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
        """A style's marker; num_styles stands for no style."""
        return self.codebook_size + 1 + style

    @property
    def source(self) -> int:
        """The marker before a source picture."""
        return self.style(self.num_styles) + 1

    @property
    def hole(self) -> int:
        """Stands for a token of a source picture that is not given."""
        return self.style(self.num_styles) + 2

    @property
    def num_new(self) -> int:
        return self.codebook_size + 2 + self.num_styles + 2 * self.with_source

    @property
    def size(self) -> int:
        """Of the joined vocabulary."""
        return self.text_size + self.num_new

    def layout(self, styles: Sequence[str]) -> dict[str, Any]:
        """Ids in the joined vocabulary, for other programs."""
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
