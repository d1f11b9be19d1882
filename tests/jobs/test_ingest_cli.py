"""`tessera ingest NAME`: a file is a command, its fields are options, its docstring is the help."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.data.sources import load_source
from pipeline.errors import DataError, PluginError

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "pipeline/data/sources/README.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "tests" / "pipeline"))

from layouts import picture, put  # noqa: E402

SQUARES = '''
"""Squares of one colour,
drawn on the spot.

No picture leaves this machine.
"""
import io
from pathlib import Path
from typing import Annotated, Literal

from PIL import Image
from pydantic import Field

from pipeline.contracts import Caption, OptionName, Positional, Sample, Source


class SquaresSource(Source):
    colours: Annotated[tuple[str, ...], Positional()] = Field(description="Names of colours.")
    side: int = Field(16, ge=8, le=64, description="Side of a square, in pixels.")
    format: Literal["png", "webp"] = Field("png", description="Format of the files.")
    notes: Annotated[tuple[str, ...], OptionName("note")] = Field((), description="More captions.")
    mirror: Path | None = Field(None, description="Where to look first.")
    loud: bool = Field(False, description="Shout.")

    def samples(self):
        for colour in self.colours:
            stream = io.BytesIO()
            Image.new("RGB", (self.side, self.side), colour).save(stream, self.format)
            texts = (f"a {colour} square", *self.notes, str(self.cache))
            captions = tuple(Caption(text.upper() if self.loud else text, "en") for text in texts)
            yield Sample(colour, stream.getvalue(), self.format, captions, colour, "flat",
                         "squares@1", "CC0-1.0", "")


SOURCE = SquaresSource
'''


@pytest.fixture
def plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The sources/ folder of a plugin directory, with one file in it."""
    folder = tmp_path / "plugins" / "sources"
    folder.mkdir(parents=True)
    (folder / "squares.py").write_text(SQUARES)
    monkeypatch.setenv(registry.PLUGINS, str(folder.parent))
    return folder


def tessera(*arguments: str, code: int = 0) -> str:
    """Standard output of the command, or standard error where it is to fail."""
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments], text=True, capture_output=True, check=False,
        env={**os.environ, "COLUMNS": "240", "NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stderr if code else done.stdout


def line(text: str, start: str) -> str:
    (found,) = (line for line in text.splitlines() if f" {start} " in line)
    return found


@pytest.mark.usefixtures("plugins")
def test_one_file_is_a_whole_command() -> None:
    listed = tessera("ingest", "--help")
    assert "Squares of one colour, drawn on the spot. " in line(listed, "squares")
    assert "on this machine" not in listed and line(listed, "folder")
    told = tessera("ingest", "squares", "--help")
    assert "Squares of one colour, drawn on the spot." in told
    assert "Names of colours. [required]" in line(told, "colours...")
    assert "Side of a square, in pixels. [default: 16]" in line(told, "--side")
    assert "8<=x<=64" in line(told, "--side") and "png|webp" in line(told, "--format")
    assert line(told, "--note") and line(told, "--mirror") and "--no-loud" in line(told, "--loud")
    assert line(told, "--out").startswith("│ *") and "[default: 256]" in line(told, "--shard-mb")
    assert "--cache" not in told


@pytest.mark.usefixtures("plugins")
def test_it_ingests(tmp_path: Path) -> None:
    home = ["--home", str(tmp_path / "home")]
    arguments = ["red", "blue", "--side", "8", "--note", "flat", "--loud", "--out", "home:mine"]
    done = json.loads(tessera("ingest", "squares", *arguments, "--json", *home))
    assert (done["samples"], done["styles"], done["languages"]) == (2, {"flat": 2}, {"en": 6})
    assert "2 samples: all whole" in tessera("data", "verify", "home:mine", *home)
    assert "less than or equal to 64" in tessera(
        "ingest", "squares", "red", "--side", "65", "--out", "x", code=2
    )
    assert "gif" in tessera("ingest", "squares", "red", "--format", "gif", "--out", "x", code=2)


def test_the_source_of_the_guide_works(plugins: Path, tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    (plugins / "listed.py").write_text(code)
    put(tmp_path, {"a.png": picture(1), "b.jpg": picture(2, "JPEG"), "c.png": picture(3)})
    put(tmp_path, {"all.tsv": "a.png\tone\nb.jpg\ttwo\nc.png\tthree\n"})
    arguments = [str(tmp_path / "all.tsv"), "--license", "MIT", "--limit", "2", "--language", "de"]
    done = json.loads(
        tessera("ingest", "listed", *arguments, "--out", str(tmp_path / "set"), "--json")
    )
    assert (done["samples"], done["sources"]) == (2, {"all.tsv": 2})
    assert (done["licenses"], done["languages"]) == ({"MIT": 2}, {"de": 2})


def test_a_source_is_checked_where_it_is_made(plugins: Path) -> None:
    squares = load_source("squares")
    made = squares(colours=["red"])
    assert [caption.text for sample in made.samples() for caption in sample.captions] == [
        "a red square", str(Path(".tessera/downloads"))
    ]  # fmt: skip
    assert made.index("anywhere") is None and squares.default_output is None
    with pytest.raises(DataError, match="unknown key 'sid'; did you mean 'side'"):
        squares(colours=["red"], sid=9)
    with pytest.raises(DataError, match="side=65: Input should be less than or equal to 64"):
        squares(colours=["red"], side=65)
    sys.modules.pop(squares.__module__)


def test_a_file_that_is_no_source_says_so(plugins: Path) -> None:
    (plugins / "odd.py").write_text("")
    with pytest.raises(PluginError, match=r"odd\.py defines no SOURCE, .*pipeline/contracts\.py"):
        load_source("odd")
    sys.modules.pop("pipeline.data.sources.odd")


def test_a_taken_name_is_one_message(plugins: Path) -> None:
    (plugins / "squares.py").rename(plugins / "folder.py")
    said = tessera("ingest", "--help", code=1)
    assert "have the same name: rename one" in said and "Traceback" not in said


@pytest.mark.parametrize("arguments", [["--help"], ["ingest", "--help"]])
def test_help_is_told_without_heavy_imports(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom jobs.cli import app\n"
        f"try: app({arguments})\nexcept SystemExit: pass\n"
        "print(*sys.modules, sep=',', file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )  # fmt: skip
    heavy = {"kornia", "numpy", "pyarrow", "ray", "torch"}
    assert "Commands" in told.stdout and not heavy & set(told.stderr.strip().split(","))
