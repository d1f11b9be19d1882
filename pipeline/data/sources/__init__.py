"""Captioned images from anywhere.

A source is one file of this folder, or of a plugin directory's folder sources/ (see
pipeline/registry.py), and `tessera ingest` has a command of the file's name. The file defines
`SOURCE`, a subclass of `contracts.Source`; README.md shows a whole one.

    source = load_source("folder")(folder="cats", license="CC0-1.0")
    for sample in source.samples():
        print(sample.key, sample.captions)
"""

from __future__ import annotations

from pipeline import registry
from pipeline.contracts import Source
from pipeline.data.sources._credited import CaptionedSource as CaptionedSource
from pipeline.data.sources._credited import ColumnSource as ColumnSource
from pipeline.data.sources._credited import CreditedSource as CreditedSource
from pipeline.data.sources._credited import FolderReader as FolderReader

__path__ = registry.search_path(__name__)


def load_source(name: str) -> type[Source]:
    """The source of that name.

    Raises:
        RecipeError: there is none; the message lists what there is.
    """
    source: type[Source] = registry.part("sources", name, "SOURCE")
    return source
