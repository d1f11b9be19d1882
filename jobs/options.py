"""Options and arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Home = Annotated[
    Path, typer.Option("--home", envvar="TESSERA_HOME", help="Everything a run writes lies here.")
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
