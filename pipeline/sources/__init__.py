"""Captioned images from anywhere: a file here is a `Source` (pipeline/contracts.py).

source = load("folder")(folder="cats", license="CC0-1.0")
for sample in source.samples():
    print(sample.key, sample.captions)
"""

from __future__ import annotations

from pipeline import registry
from pipeline.contracts import Source
from pipeline.errors import PluginError

__path__ = registry.search_path(__name__)


def load(name: str) -> type[Source]:
    """The source that a file of this folder, or of a plugin directory, defines.

    Raises:
        RecipeError: there is no such file; the message lists those there are.
        PluginError: the file defines no source, or several.
    """
    module = registry.load("sources", name)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Source)
        if value.__module__ == module.__name__
    ]
    if len(found) != 1:
        defined = ", ".join(cls.__name__ for cls in found) or "none"
        raise PluginError(f"{module.__file__} must define one subclass of Source: it has {defined}")
    return found[0]
