"""Writes jobs/README.md: the help text of every `tessera` command, as plain text on one page.

    python -m jobs.cli_docs    # after every change of a command, an option or a help text

The page holds what `--help` shows, so that the commands can be read and searched without installing
Tessera. It is the same whatever the terminal, the environment, the plugins and the installed extras
are; only another version of Typer lays it out differently, which is why the page names the version.
tests/jobs/test_cli_docs.py fails while the page is out of date.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import typer
from typer.core import TyperCommand, TyperGroup

from jobs.cli import app
from pipeline.registry import PLUGINS

PAGE = Path(__file__).with_name("README.md")
WIDTH = 100  # columns of a help text
COMMAND = "python -m jobs.cli_docs"
OPENING = f"""\
<!-- Written by `{COMMAND}` with Typer {version("typer")}: do not edit. Run the command again after
     every change of a command, an option or a help text in jobs/; a test compares the two. -->

# The `tessera` command

The files of this folder are jobs that a person or a scheduler runs, one per file, and the `tessera`
command over them (`cli.py` and the other `*cli.py`). The usual order is `tessera ingest SOURCE`,
which writes captioned pictures as shards, `tessera retrain RECIPE`, which preprocesses, trains,
evaluates and promotes, and `tessera serve`. `tessera demo` does all of it on data that ships with
Tessera.

Results go to standard output, as JSON with `--json`; progress and errors go to standard error. The
exit status is 0 for success, 1 for an error that the message says how to mend, 2 for a mistake in
the arguments or an unexpected error (`--debug` shows its traceback), 130 after Ctrl-C and 143 after
SIGTERM. Of a recipe's steps those that were done before with the same data and settings are
skipped.

Below is what each command says with `--help`.
"""


def page() -> str:
    """What jobs/README.md must hold."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    with _without_plugins():
        sections = [_section(context) for context in contexts(root, "tessera")]
    return "\n".join([OPENING, *sections])


def contexts(
    command: TyperCommand | TyperGroup, name: str, parent: typer.Context | None = None
) -> Iterator[typer.Context]:
    """A command's context, and those of the commands below it, in the order `--help` lists them."""
    context = typer.Context(
        command, info_name=name, parent=parent, terminal_width=WIDTH, max_content_width=WIDTH
    )
    yield context
    if isinstance(command, TyperGroup):
        for name, child in command.commands.items():
            assert isinstance(child, TyperCommand | TyperGroup)
            yield from contexts(child, name, context)


@contextlib.contextmanager
def _without_plugins() -> Iterator[None]:
    """Leave out the sources of plugin directories, whose commands are not Tessera's."""
    directories = os.environ.pop(PLUGINS, None)
    try:
        yield
    finally:
        if directories is not None:
            os.environ[PLUGINS] = directories


def _section(context: typer.Context) -> str:
    """One command: a heading, below it its help text in a fence."""
    command = context.command
    assert isinstance(command, TyperCommand | TyperGroup)
    command.rich_markup_mode = None  # plain text: no boxes, no colours
    path = context.command_path
    depth = 2 + max(0, path.count(" ") - 1)
    help_text = re.sub(r" +$", "", command.get_help(context), flags=re.MULTILINE)
    return f"{'#' * depth} {path}\n\n```text\n{help_text}\n```\n"


def main() -> None:
    """Write the page and print its path."""
    PAGE.write_text(page(), encoding="utf-8")
    typer.echo(PAGE)


if __name__ == "__main__":
    main()
