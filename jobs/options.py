"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.errors import ResourceError

ImageFormat = Literal["png", "jpeg", "webp"]
IMAGE_FORMATS: dict[str, ImageFormat] = {
    "": "png",
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
"""Pillow's names of the formats that image files are written in, by the file name's ending."""


def _home(given: str | Path) -> Path:
    """The home directory, which must not be a URI: Path would take that for a relative directory,
    and nothing for the current one.

    Raises:
        ResourceError: `given` is empty, a URI or a file.
    """
    if not str(given):
        raise ResourceError("--home is empty: name a directory, or leave it out for .tessera")
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(given)):
        raise ResourceError(
            f"--home={given}: the home directory must lie on a file system (on a cluster a shared "
            "one, mounted on every node); object stores are for shards alone"
        )
    home = Path(given)
    if blocked := _file_on_the_way(home / "anything"):
        raise ResourceError(
            f"--home={home}: {blocked} is a file; name a directory, which need not exist yet"
        )
    return home


def check_output(out: Path) -> None:
    """Refuse, before any work, a path that no file can be written to.

    Raises:
        ResourceError: `out` is a directory, or lies below a file.
    """
    if out.is_dir():
        raise ResourceError(f"--out={out} is a directory; name the file to write")
    if blocked := _file_on_the_way(out):
        raise ResourceError(f"--out={out}: {blocked} is a file, and no directory to write into")


def image_format(out: Path) -> ImageFormat:
    """Pillow's name of the format that an image file's name ends with; PNG without an ending.

    Raises:
        ResourceError: `out` has another ending, or `check_output` refuses it.
    """
    check_output(out)
    found = IMAGE_FORMATS.get(out.suffix.lower())
    if found is None:
        endings = ", ".join(filter(None, IMAGE_FORMATS))
        raise ResourceError(
            f"--out={out}: images are not written as {out.suffix}; the endings are {endings}"
        )
    return found


def _file_on_the_way(path: Path) -> Path | None:
    """The parent of `path` that is a file, if one is."""
    nearest = next((parent for parent in path.parents if parent.exists()), Path())
    return None if nearest.is_dir() else nearest


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="TESSERA_HOME",
        help="Directory below which everything is written and found again: MLflow's database, step "
        "results, bundles, converted language models.",
        parser=_home,
        metavar="<path>",
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(help="Name of a shipped recipe (see `tessera recipes`) or path of a YAML file."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings of the recipe to change, for example generator.train.learning_rate=3e-4; "
        "may be repeated."
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output.")
]
Debug = Annotated[
    bool, typer.Option("--debug", help="Show log messages, and tracebacks of errors.")
]
DEFAULT_HOME = Path(".tessera")
