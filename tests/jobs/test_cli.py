"""The `tessera` command as a person meets it: help that teaches, one message a mistake."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from mlflow import MlflowClient
from PIL import Image
from rich.console import Console
from served import TESSERA
from typer.testing import CliRunner

from jobs import cli, entry, generate
from jobs.cli import app
from jobs.console import ConsoleReporter
from pipeline.config import recipe_names
from pipeline.errors import MissingExtraError, RecipeError, TesseraError
from pipeline.tracking.runs import tracking_uri

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_stands_in_the_readme(command: str) -> None:
    shown = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "100"})
    assert shown.exit_code == 0 and len(shown.output.split()) > 20
    assert f"`tessera {command}" in README or f"`{command}`" in README


def test_every_recipe_stands_in_the_readme() -> None:
    for name in recipe_names():
        assert f"`{name}`" in README


def test_ci_runs_exactly_the_readme_test_command() -> None:
    command = (ROOT / ".ci" / "run").read_text().splitlines()[-1]
    assert f"```bash\n{command}\n```" in README


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["retrain", "smok"], "Did you mean 'smoke'"),
        (["retrain", "smoke", "generator.widht=2"], "did you mean 'width'"),
        (["retrain", "smoke", "data.shards=[home:nothing]"], "no manifest.json"),
        (["retrain", "smoke", "caption_encoder.model=nobody/nothing"], "caption encoder"),
        (["generate", " ", "--model", "asset:nothing"], "no bundle at asset:nothing"),
        (["serve", "models:/nobody@champion"], "not in the registry"),
        (
            ["serve", "asset:base", "--recipe", "smoke", "--port", "99999"],
            "choose another with --port",
        ),
        (["data", "verify", "foo://somewhere"], "s3://BUCKET/FOLDER"),
        (["evaluate", "./nowhere", "--data", "asset:emoji"], "no bundle at ./nowhere"),
    ],
)
def test_a_mistake_is_one_message(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *arguments, "--home", str(tmp_path / "home")],
        capture_output=True, text=True, timeout=240, check=False,
        env={**__import__("os").environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 1
    assert said in result.stderr and "Traceback" not in result.stderr
    assert "error:" in result.stderr


def test_a_service_without_a_recipe_reads_the_environment(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app,
        ["serve", "asset:base", "--home", str(tmp_path)],
        env={"TESSERA__SERVE__NUM_GPU": "1"},
    )
    assert isinstance(result.exception, RecipeError)
    assert "did you mean 'num_gpus'" in str(result.exception)


@pytest.mark.parametrize(
    "error",
    [MissingExtraError("LoRA", "lora"), ValueError("no file [/tmp/a] [bold] :cat: C:\\[b]\\")],
)
def test_a_message_is_shown_as_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit):
        cli.main()
    assert str(error) in capsys.readouterr().err


def test_reasons_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    decision = SimpleNamespace(promoted=True, reasons=["kid 0.1 [/0, 0.2]"])
    cli._print_decision(SimpleNamespace(choice=["a [b]"], decision=decision, version="1"), "m")
    said = capsys.readouterr().err
    assert "a [b]" in said and "kid 0.1 [/0, 0.2]" in said and "models:/m/1: promoted" in said


def test_an_occupied_port_is_named_before_anything_starts(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "jobs.cli", "demo", "--port", port, "--home", str(tmp_path)],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert result.returncode == 1 and port in result.stderr and "--port" in result.stderr


def test_doctor_names_what_is_there(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["doctor", "--json", "--home", str(tmp_path)])
    assert '"caption encoder"' in shown.output and "memory" in shown.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", "apple", "--home", "s3://bucket/home"], "must lie on a file system"),
        (["key", "a b: c"], "name='a b: c'"),
        (["generate", "apple", "--home", ""], "--home is empty"),
        (["generate", "apple", "--home", "file/home"], "--home=file/home: file is a file"),
        (["generate", "apple", "--out", "."], "is a directory"),
        (["generate", "apple", "--out", "file/apple.png"], "file is a file, and no directory"),
        (["generate", "apple", "--out", "apple.gif"], "the endings are .png, .jpg, .jpeg, .webp"),
        (["data", "show", "asset:emoji", "--out", "sheet.pdf"], "images are not written as .pdf"),
        (["tune", "smoke", "--out", "file/best.yaml"], "file is a file, and no directory"),
        (["export", "asset:base", "--out", "file/model"], "file is a file, and no directory"),
    ],
)
def test_a_mistake_that_needs_no_home(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, TesseraError) and said in str(result.exception)


def test_doctor_says_that_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    shown = CliRunner().invoke(app, ["doctor", "--json", "--home", str(tmp_path)])
    found = {item["what"]: item for item in json.loads(shown.output)}
    assert shown.exit_code == 1
    assert not found["Ray"]["fine"] and "unset RAY_ADDRESS" in found["Ray"]["remedy"]
    assert not found["MLflow"]["fine"] and "Start the server" in found["MLflow"]["remedy"]


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("jobs.steps.run_step", interrupted)
    monkeypatch.setattr(sys, "argv", ["tessera", "preprocess", "smoke", "--home", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert "interrupted; run the same command again" in capsys.readouterr().err


def test_ctrl_c_while_commands_are_imported_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    class Impatient:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "jobs.cli":
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.delitem(sys.modules, "jobs.cli")
    monkeypatch.setattr(sys, "meta_path", [Impatient, *sys.meta_path])
    with pytest.raises(SystemExit) as ended:
        entry.main()
    assert ended.value.code == 130


@pytest.mark.parametrize(
    ("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP"), ("a", "PNG")]
)
def test_an_image_is_of_the_format_that_its_name_says(
    name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = SimpleNamespace(generate=lambda requests: torch.zeros(len(requests), 3, 8, 8).byte())
    monkeypatch.setattr(generate, "load_generator", lambda *_, **__: drawn)
    out = tmp_path / "new" / name
    written = generate.generate("a cat", out, home=tmp_path, model="asset:base", num_images=2)
    assert len(written) == 3 and written[0] == out
    for path in written:
        assert path.suffix == out.suffix
        with Image.open(path) as image:
            assert image.format == kind
    assert b"a cat" in written[1].read_bytes() or "a cat".encode("utf-16-be") in (
        written[1].read_bytes()
    )


def test_the_bar_goes_however_a_step_ends() -> None:
    console = Console(file=io.StringIO(), force_terminal=True)
    with pytest.raises(KeyboardInterrupt), ConsoleReporter(console) as reporter:
        reporter.started("train")
        raise KeyboardInterrupt
    drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert drawn.rfind("\x1b[?25h") > drawn.rfind("\x1b[?25l") >= 0, "the cursor is shown again"


@pytest.mark.slow
def test_sigterm_ends_a_retrain_as_schedulers_expect(new_home: Callable[[str], Path]) -> None:
    home = new_home("terminated")
    process = subprocess.Popen(
        [*TESSERA, "retrain", "smoke", "--home", str(home)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "preprocess: started" in line:
            break
    time.sleep(5)
    process.terminate()
    said = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert "run the same command again" in said and "SIGTERM received" not in said
    runs = MlflowClient(tracking_uri(home)).search_runs(["0", "1"])
    assert {run.info.status for run in runs} == {"KILLED"}
