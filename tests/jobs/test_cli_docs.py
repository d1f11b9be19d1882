"""Texts about the command line are true: the generated page, and every command the guides name."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from itertools import dropwhile, groupby
from pathlib import Path
from typing import Any

import pytest
import typer

from jobs import cli_docs
from jobs.cli import app
from pipeline import registry
from pipeline.config import load_recipe, recipe_names

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "README.md"] + [
    path
    for folder in ("infra", "pipeline", "serve")
    for path in sorted((ROOT / folder).rglob("*.md"))
    if "tessera " in path.read_text(encoding="utf-8")
]
OPERATORS = {"&&", "||", "|", ";"}


def test_the_page_is_what_the_command_writes() -> None:
    written = cli_docs.PAGE.read_text(encoding="utf-8")
    if f"Typer {version('typer')}:" not in written:
        pytest.skip(f"Typer {version('typer')} lays help out otherwise than the page's version")
    assert written == cli_docs.page(), f"jobs/README.md is out of date: run `{cli_docs.COMMAND}`"


def test_the_page_depends_on_no_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = cli_docs.page()
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "nobodys.py").write_text('"""A source of nobody\'s."""\n')
    for name, value in {
        "COLUMNS": "40", "TERMINAL_WIDTH": "40", "FORCE_COLOR": "1", "TERM": "xterm-256color",
        "TESSERA_HOME": "/somewhere", "TESSERA_PLUGINS": str(tmp_path),
        "TESSERA_API_KEY": "secret", "LANG": "zh_CN.UTF-8",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert cli_docs.page() == before and os.environ["TESSERA_PLUGINS"] == str(tmp_path)
    assert "\x1b" not in before
    assert all(len(line) <= cli_docs.WIDTH for line in _help_lines(before))


def test_the_page_has_every_command() -> None:
    headings = re.findall(r"^#+ (tessera.*)$", cli_docs.page(), re.MULTILINE)
    assert {"tessera", "tessera train", "tessera ingest folder", "tessera bench serve"} <= set(
        headings
    )
    assert len(headings) == len(set(headings))


def _help_lines(page: str) -> list[str]:
    return [line for block in re.findall(r"```text\n(.*?)```", page, re.S)
            for line in block.splitlines()]  # fmt: skip


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_guides_parse(guide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in bash blocks are complete: arguments, options and a recipe's settings exist."""
    monkeypatch.setenv(registry.PLUGINS, str(ROOT / "tests" / "plugins"))
    for words in _commands_in_blocks(guide.read_text(encoding="utf-8")):
        command, name, arguments = _resolve(words)
        context = command.make_context(name, list(arguments))  # a mistake raises
        if context.params.get("recipe") in recipe_names():
            load_recipe(context.params["recipe"], context.params.get("overrides") or ())


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_sentences_exist(guide: Path) -> None:
    """Commands within a sentence may leave out arguments, but name nothing that is not there."""
    for words in _commands_in_sentences(guide.read_text(encoding="utf-8")):
        command, _, arguments = _resolve(words)
        known = {"--help", *(option for p in command.params for option in
                             (*p.opts, *p.secondary_opts))}  # fmt: skip
        named = {word.partition("=")[0] for word in arguments if word.startswith("-")}
        assert named <= known, f"`tessera {' '.join(words)}` has no option {named - known}"


def test_the_guides_commands_are_found() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(list(_commands_in_blocks(readme))) >= 4
    assert len(list(_commands_in_sentences(readme))) >= 10
    assert {"README.md", "serve/README.md"} <= {str(path.relative_to(ROOT)) for path in GUIDES}


@pytest.mark.parametrize("line", ["trian emoji-demo", "data verfy home:cats"])
def test_an_unknown_command_is_noticed(line: str) -> None:
    with pytest.raises(AssertionError, match="no command"):
        _resolve(line.split())


def _commands_in_blocks(text: str) -> Iterator[list[str]]:
    """The words after `tessera` of every command in the bash blocks."""
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            yield from _commands(line)


def _commands_in_sentences(text: str) -> Iterator[list[str]]:
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    for code in re.findall(r"`([^`]+)`", prose):
        if re.match(r"tessera\s+[a-z]", code):
            yield from _commands(code)


def _commands(line: str) -> Iterator[list[str]]:
    """The words after `tessera` of every command in a line of shell."""
    words = shlex.split(line, comments=True)
    for is_operator, group in groupby(words, OPERATORS.__contains__):
        command = list(dropwhile(re.compile(r"[A-Z_]+=").match, group))  # variables set for it
        if not is_operator and command and Path(command[0]).name == "tessera":
            yield command[1:]


def _resolve(words: list[str]) -> tuple[Any, str, list[str]]:
    """The innermost command that `words` name, its name, and the words left for it."""
    command: Any = typer.main.get_command(app)
    name, rest = "tessera", list(words)
    while hasattr(command, "commands") and rest and re.fullmatch(r"[a-z][a-z0-9-]*", rest[0]):
        assert rest[0] in command.commands, f"no command `tessera {' '.join(words)}`"
        name = rest.pop(0)
        command = command.commands[name]
    return command, name, rest
