"""Options and arguments that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ResourceError


def _on_a_file_system(home: Path) -> Path:
    """Raises ResourceError for a URI, of which Path would make a folder's name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(home)):
        raise ResourceError(
            f"--home={home}: the home directory must lie on a file system (on a cluster a shared "
            "one, mounted on every node); object stores are for shards alone"
        )
    return home


Home = Annotated[
    Path,
    typer.Option(
        "--home",
        envvar="TESSERA_HOME",
        help="Everything a run writes lies here.",
        callback=_on_a_file_system,
    ),
]
RecipeName = Annotated[
    str, typer.Argument(help="A shipped recipe (`tessera recipes`) or a YAML file.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, e.g. generator.train.learning_rate=3e-4"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show logs, and tracebacks of errors.")]
DEFAULT_HOME = Path(".tessera")
