"""Image tokenizers: an image <-> a grid of discrete tokens.

A tokenizer is one file of this folder, or of a plugin directory's folder tokenizers/ (see
pipeline/registry.py), and the file's name is what a recipe calls it in `tokenizer.name`. The file
defines its network, a `pipeline.objective.TokenizerNetwork`, its config section if it has settings
of its own, and `TOKENIZER`, a `contracts.TokenizerKind`. Training, the directory on disk, encoding,
the model families and evaluation ask nothing else of it.

fsq.py and vq.py are quantisers inside the convolutional autoencoder of _autoencoder.py;
tests/plugins/tokenizers/mean_colour.py is another network altogether.

    network = build_tokenizer(recipe.tokenizer, image_size=64)      # freshly initialised
    network = load_tokenizer(resolve_tokenizer("asset:base"))       # trained: _saved.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline import registry
from pipeline.contracts import TokenizerKind

if TYPE_CHECKING:
    from pipeline.config.tokenizer import TokenizerConfig
    from pipeline.objective import TokenizerNetwork

__path__ = registry.search_path(__name__)


def load_tokenizer_kind(name: str) -> TokenizerKind:
    """The kind of tokenizer of that name.

    Raises:
        RecipeError: there is none; the message lists what there is.
    """
    kind: TokenizerKind = registry.part("tokenizers", name, "TOKENIZER")
    return kind


def build_tokenizer(config: TokenizerConfig, image_size: int) -> TokenizerNetwork:
    """A freshly initialised network of the kind `config.name`, for images of that size.

    Raises:
        RecipeError: there is no such tokenizer, or its settings do not fit.
    """
    return load_tokenizer_kind(config.name).build(config, image_size)
