"""`tessera ingest NAME`: one command per source, generated from the registry.

The commands are the files of pipeline/data/sources and of the plugin directories
(pipeline/registry.py). A list of commands needs no more than their names and docstrings; a source's
file is imported only when its own command is asked for. What its arguments and options are,
`Source` in pipeline/contracts.py says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import typer
from annotated_types import Ge, Le
from typer.core import TyperCommand, TyperGroup

from jobs.options import DEFAULT_HOME, AsJson, Debug, Home
from pipeline import registry

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo

    from pipeline.contracts import Source

Out = Annotated[
    str,
    typer.Option(
        "--out",
        help="Shard set to write or replace: a directory, a URI (s3://, gs://), or home:NAME for "
        "HOME/shards/NAME.",
    ),
]
ShardMb = Annotated[
    float,
    typer.Option(
        "--shard-mb", min=0.1, help="Largest size of a shard in megabytes, before compression."
    ),
]
Compress = Annotated[
    bool,
    typer.Option("--compress", help="Gzip the shards; pays where the pictures are small."),
]
SHARED: dict[str, tuple[Any, Any]] = {
    "shard_mb": (ShardMb, 256),
    "compress": (Compress, False),
    "home": (Home, DEFAULT_HOME),
    "as_json": (AsJson, False),
    "debug": (Debug, False),
}
"""Annotation and default of the options that every source's command has."""


class _Commands(Mapping[str, TyperCommand]):
    """A command for every source there is at the moment."""

    def __getitem__(self, name: str) -> TyperCommand:
        if name not in registry.names("sources"):
            raise KeyError(name)
        return _SourceCommand(name, registry.summary("sources", name))

    def __iter__(self) -> Iterator[str]:
        return iter(registry.names("sources"))

    def __len__(self) -> int:
        return len(registry.names("sources"))


class _Group(TyperGroup):
    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = _Commands()  # type: ignore[assignment]  # nobody adds to it


class _SourceCommand(TyperCommand):
    """Imports its source when it needs parameters or is run, but not to stand in a list."""

    def __init__(self, name: str, summary: str) -> None:
        super().__init__(name, help=summary)
        del self.params, self.callback

    def __getattr__(self, attribute: str) -> Any:
        if attribute not in ("params", "callback"):
            raise AttributeError(attribute)
        made = _command(str(self.name))
        self.params, self.callback = made.params, made.callback
        return getattr(self, attribute)


ingest_app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    help="Write the captioned pictures of a source as a shard set. To add a source, add one "
    "file: see pipeline/data/sources/README.md.",
)


def _command(name: str) -> TyperCommand:
    """The command of a source, as Typer makes it of a function with the source's signature."""
    from pipeline.data.sources import load_source

    source = load_source(name)

    def run(
        out: str,
        shard_mb: float,
        compress: bool,
        home: Path,
        as_json: bool,
        debug: bool,
        **settings: Any,
    ) -> None:
        from rich.console import Console

        from jobs.console import ingest_table
        from jobs.ingest import ingest
        from pipeline.data.shards.manifest import locate

        made = source(cache=home / "downloads", **settings)
        output = locate(out, home)
        max_shard_bytes = round(shard_mb * 1_000_000)
        manifest = ingest(made, output, max_shard_bytes=max_shard_bytes, compress=compress)
        Console(stderr=True, emoji=False).print(ingest_table(manifest))
        typer.echo(manifest.model_dump_json() if as_json else output)

    run.__signature__ = _signature(source)  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False)
    app.command()(run)
    command = typer.main.get_command(app)
    assert isinstance(command, TyperCommand)
    return command


def _signature(source: type[Source]) -> inspect.Signature:
    """What is required first, then the source's own settings, inherited ones, and SHARED."""
    from pipeline.contracts import Source

    own = inspect.get_annotations(source)
    names = [name for name in source.model_fields if name not in Source.model_fields]
    fields = {name: source.model_fields[name] for name in sorted(names, key=lambda n: n not in own)}
    settings = [_setting(name, field) for name, field in fields.items()]
    output = _parameter("out", Out, source.default_output)
    shared = [_parameter(name, *value) for name, value in SHARED.items()]
    parameters = [output, *settings] if source.default_output else [*settings, output]
    required = [p for p in parameters if p.default is p.empty]
    optional = [p for p in parameters if p.default is not p.empty]
    return inspect.Signature([*required, *optional, *shared])


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    """An argument or option; without a default it is required."""
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=annotation,
        default=inspect.Parameter.empty if default is None else default,
    )


def _setting(name: str, field: FieldInfo) -> inspect.Parameter:
    """The argument or option for a field of a source."""
    from pipeline.contracts import OptionName, Positional

    low: Any = next((m.ge for m in field.metadata if isinstance(m, Ge)), None)
    high: Any = next((m.le for m in field.metadata if isinstance(m, Le)), None)
    told: Any
    if any(isinstance(m, Positional) for m in field.metadata):
        told = typer.Argument(help=field.description, min=low, max=high)
    else:
        names = [f"--{m.name}" for m in field.metadata if isinstance(m, OptionName)]
        told = typer.Option(*names, help=field.description, min=low, max=high)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=Annotated[_listed(field.annotation), told],
        default=inspect.Parameter.empty if field.is_required() else field.get_default(),
    )


def _listed(annotation: Any) -> Any:
    """tuple[X, ...] -> list[X], which is what Typer takes for an option that may be repeated."""
    if get_origin(annotation) is tuple:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation
