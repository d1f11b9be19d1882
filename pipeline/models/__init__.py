"""Text-to-image model families: caption (and source image) -> image.

A family is one file of this folder, and the file's name is the family's name in
`generator.family`. The file defines its config section and `FAMILY`, a `contracts.Family`; what
must not be imported to read a recipe (PyTorch, transformers) it imports where it is needed. The
shipped families keep their networks in networks/, and decoding is shared among them.

    family = load_family("masked")
    network = family.build(config, spec)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from pipeline import registry
from pipeline.contracts import Family
from pipeline.errors import PluginError

__path__ = registry.search_path(__name__)


def load_family(name: str) -> Family:
    """The family of that name.

    Raises:
        RecipeError: there is none; the message lists what there is.
    """
    family: Family = registry.part("models", name, "FAMILY")
    return family


def families_that(fit: Callable[[Family], bool]) -> list[str]:
    """The names of the families for which `fit` holds, sorted; of plugins, which may be broken,
    those that can be used."""
    found = []
    for name in registry.names("models"):
        with contextlib.suppress(PluginError):
            if fit(load_family(name)):
                found.append(name)
    return found
