"""Writes README.md's map of the code: one line per folder and file, from its docstring.

    python -m jobs.file_map    # after a file was added, moved or described anew

tests/test_layers.py fails while the map is out of date.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import typer

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
COMMAND = "python -m jobs.file_map"
BEGIN, END = f"<!-- map: written by `{COMMAND}` -->", "<!-- end of the map -->"
FOLDERS = (
    "pipeline", "pipeline/config", "pipeline/metrics", "pipeline/tracking", "pipeline/tasks",
    "pipeline/text", "pipeline/tokenizers", "pipeline/images", "pipeline/data",
    "pipeline/data/shards", "pipeline/data/sources", "pipeline/data/preprocess", "pipeline/models",
    "pipeline/models/decoding", "pipeline/models/networks", "pipeline/bundles",
    "pipeline/evaluation", "pipeline/evaluation/judges", "pipeline/evaluation/page",
    "pipeline/training", "pipeline/chain",
    "serve", "jobs",
)  # fmt: skip
"""In the order of their layers: files import from folders that come earlier in the list."""


def file_map() -> str:
    """The map, between its markers."""
    return "\n".join([BEGIN, "", "```text", *_lines(), "```", "", END])


def with_map(readme: str) -> str:
    """README.md with its map replaced by the current one."""
    pattern = f"{re.escape(BEGIN)}.*{re.escape(END)}"
    return re.sub(pattern, lambda _: file_map(), readme, flags=re.DOTALL)


def _lines() -> Iterator[str]:
    for name in FOLDERS:
        files = sorted((ROOT / name).glob("*.py"))
        yield f"{name + '/':<28}{_summary(ROOT / name / '__init__.py')}"
        for path in files:
            if path.name != "__init__.py":
                yield f"    {path.name:<24}{_summary(path)}"


def _summary(path: Path) -> str:
    """The first sentence of a file's docstring."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[^.]{12}[.?])\s", paragraph, maxsplit=1)[0].rstrip(".")


if __name__ == "__main__":
    README.write_text(with_map(README.read_text(encoding="utf-8")), encoding="utf-8")
    typer.echo(README)
