"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ResourceError


def _on_a_file_system(home: Path) -> Path:
    """The home directory, which must not be a URI: Path would take that for a relative directory.

    Raises:
        ResourceError: `home` is a URI or a file.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(home)):
        raise ResourceError(
            f"--home={home}: the home directory must lie on a file system (on a cluster a shared "
            "one, mounted on every node); object stores are for shards alone"
        )
    if home.exists() and not home.is_dir():
        raise ResourceError(f"--home={home} is a file: name a directory, which need not exist yet")
    return home


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="TESSERA_HOME",
        help="Directory below which everything is written and found again: MLflow's database, step "
        "results, bundles, converted language models.",
        callback=_on_a_file_system,
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
