"""`tessera ingest SOURCE` and `tessera data ...` as a person types them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from pipeline.config import Recipe
from pipeline.errors import DataError

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "pipeline/data/sources/README.md").read_text(encoding="utf-8")
sys.path.append(str(ROOT / "tests" / "pipeline"))

from layouts import coco, img2dataset, picture, put  # noqa: E402


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.stdout


def test_every_source_ingests_verifies_and_shows(tmp_path: Path) -> None:
    folder = put(tmp_path / "cats", {"a.png": picture(1), "a.txt": "a cat", "b.png": picture(2)})
    annotations, images = coco(tmp_path)
    tars = img2dataset(tmp_path / "laion")
    put(tmp_path / "cats", {"b.txt": "b"})
    home = ["--home", str(tmp_path / "home")]
    mine = ["--license", "CC0-1.0"]
    counts = {
        "folder": ([folder, *mine], 2),
        "unlabelled": ([folder, *mine], 2),
        "coco": ([annotations, images], 2),
        "webdataset": ([tars, *mine], 10),
    }
    for source, (arguments, samples) in counts.items():
        out = run("ingest", source, *arguments, "--out", f"home:{source}", *home)
        assert out.strip() == str(tmp_path / "home" / "shards" / source)
        assert "all whole" in run("data", "verify", f"home:{source}", *home)
        sheet = tmp_path / f"{source}.png"
        shown = run("data", "show", f"home:{source}", "--out", str(sheet), "--json", *home)
        assert json.loads(shown)["samples"] == samples
        assert np.asarray(Image.open(sheet)).std() > 5
    copied = run(
        "ingest", "webdataset", tars, *mine, "--copy", "--out", "home:own", *home, "--json"
    )
    lost = {"of": "image", "reason": "failed_download", "count": 2,
            "example": "00000.tar: 000000004"}  # fmt: skip
    assert json.loads(copied)["samples"] == 8 and json.loads(copied)["losses"] == [lost]
    told = run("data", "show", "home:own", "--out", str(tmp_path / "sheet.png"), *home)
    assert "left out   image failed_download 2: 00000.tar: 000000004" in told


def test_an_ingest_ends_with_a_table(tmp_path: Path) -> None:
    files = {"a.png": picture(1), "a.txt": "a [bold]cat", "b.png": picture(2), "c.png": b"<html>"}
    folder = put(tmp_path / "cats", files)
    arguments = [folder, "--license", "MIT", "--out", str(tmp_path / "set")]
    table = CliRunner().invoke(app, ["ingest", "folder", *arguments]).stderr
    rows = [line.split() for line in table.splitlines() if "│" in line]
    told = {" ".join(row[: row.index("│")]): row[row.index("│") + 1 :] for row in rows}
    assert told["pictures found"][0] == "3" and told["pictures used"][0] == "1"
    assert told["no_caption"][:3] == ["1", "│", "b"] and told["undecodable"][0] == "1"
    with pytest.raises(DataError, match=r"no picture can be used: undecodable 1 \(c: begins with"):
        run("ingest", "unlabelled", put(tmp_path / "bad", {"c.png": b"<html>"}), *arguments[1:])
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["samples"] == 2, "the set before stays"


def test_verify_names_the_shard_and_fails(tmp_path: Path) -> None:
    folder = put(tmp_path / "cats", {f"{i}.png": picture(i) for i in range(3)})
    out = str(tmp_path / "set")
    run("ingest", "unlabelled", folder, "--license", "MIT", "--out", out)
    (shard,) = (tmp_path / "set").glob("*.tar")
    shard.write_bytes(shard.read_bytes()[:1000])
    put(tmp_path / "set", {"00009-aaaaaaaaaaaa.tar": b""})
    said = run("data", "verify", out, code=1)
    assert f"{shard.name} is truncated" in said and "00009-aaaaaaaaaaaa.tar is surplus" in said
    assert [p["kind"] for p in json.loads(run("data", "verify", out, "--json", code=1))] == [
        "truncated",
        "surplus",
    ]
    with pytest.raises(DataError, match="not a shard set"):
        run("data", "show", str(tmp_path))


def test_show_the_shipped_set(tmp_path: Path) -> None:
    said = run("data", "show", "asset:emoji", "--out", str(tmp_path / "sheet.png"))
    assert "noto 1911, twemoji 1911" in said and "Apache-2.0 1911" in said
    assert Image.open(tmp_path / "sheet.png").width > 8 * 96


def test_the_limit_of_bad_samples_is_an_option(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = []

    def run_step(name: str, recipe: Recipe, home: Path, *_: object, **__: object) -> dict:
        found.append((name, recipe.preprocess.max_bad_fraction, recipe.data.limit))
        return {"path": "there"}

    monkeypatch.setattr("jobs.steps.run_step", run_step)
    run(
        "preprocess", "smoke", "data.limit=40", "--max-bad-fraction", "0.2", "--home", str(tmp_path)
    )
    run("preprocess", "smoke", "--home", str(tmp_path))
    assert found == [("preprocess", 0.2, 40), ("preprocess", 0.05, 120)]


def test_augmentations_are_shown(tmp_path: Path) -> None:
    out = tmp_path / "grid.png"
    assert run("data", "augment", "smoke", "--out", str(out), "--count", "4").strip() == str(out)
    shown = np.asarray(Image.open(out))
    assert shown.shape[0] > 17 * 64, "the pictures, thirteen effects and three sections"


def test_every_command_of_the_guide_parses() -> None:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE, re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.startswith("tessera ")]
    assert len(lines) >= 8
    group = typer.main.get_command(app)
    for line in lines:
        context, arguments = typer.Context(group), shlex.split(line, comments=True)[1:]
        command = group
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
        command.make_context("x", arguments, parent=context, resilient_parsing=False)
