"""One registry for all kinds: the files of Tessera and those of the plugin directories."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.config import load_recipe
from pipeline.errors import PluginError, RecipeError
from pipeline.tasks import gives_source

TOY = '"""Toy tasks,\nof two lines.\n\nMore."""\n\nfrom pipeline.tasks._toys import Toy as Toy\n'


@pytest.fixture
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A plugin directory with one task and a helper."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "toy.py").write_text(TOY)
    (folder / "_toys.py").write_text("class Toy:\n    pass\n")
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    return tmp_path


def run(code: str, plugins: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True,
        env={**os.environ, registry.PLUGINS: plugins},
    ).stdout  # fmt: skip


@pytest.mark.parametrize("kind", registry.PACKAGES)
def test_every_file_of_every_kind_loads(kind: str) -> None:
    for name in registry.names(kind):
        assert registry.load(kind, name).__name__ == f"{registry.PACKAGES[kind]}.{name}"
        assert registry.summary(kind, name)


@pytest.mark.parametrize("kind", registry.PACKAGES)
def test_an_unknown_name_says_what_there_is(kind: str) -> None:
    first = registry.names(kind)[0]
    with pytest.raises(RecipeError, match=f"there are: {first}.*Did you mean '{first}'"):
        registry.load(kind, first + "x")


def test_a_plugin_is_registered_by_its_name_and_helpers_are_not(toys: Path) -> None:
    assert "toy" in registry.names("tasks") and "_toys" not in registry.names("tasks")
    assert "toy" not in registry.names("models")
    assert registry.summary("tasks", "toy") == "Toy tasks, of two lines."


def test_what_a_plugin_defines_can_be_sent_to_another_process(toys: Path) -> None:
    made = "from pipeline import registry\nimport pickle\n"
    made += "print(pickle.dumps(registry.load('tasks', 'toy').Toy()).hex())"
    sent = run(made, str(toys)).strip()
    assert pickle.dumps("pipeline.tasks._toys")[4:-2] in bytes.fromhex(sent)
    read = f"import pickle; print(type(pickle.loads(bytes.fromhex('{sent}'))))"
    assert "pipeline.tasks._toys.Toy" in run(read, str(toys))


def test_a_name_that_is_taken_is_an_error(toys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = toys / "other"
    (other / "tasks").mkdir(parents=True)
    (other / "tasks" / "toy.py").write_text("")
    monkeypatch.setenv(registry.PLUGINS, os.pathsep.join((str(toys), str(other))))
    with pytest.raises(PluginError, match=r"toy\.py and .*other/tasks/toy\.py have the same name"):
        registry.names("tasks")
    (other / "tasks" / "toy.py").rename(other / "tasks" / "completion.py")
    with pytest.raises(PluginError, match=r"pipeline/tasks/completion\.py and .*rename one"):
        registry.load("tasks", "toy")


def test_a_plugin_directory_that_is_none_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, said in (
        (tmp_path / "nowhere", "not the absolute path of a directory"),
        (Path(), "not the absolute path of a directory"),
        (tmp_path, "none of the folders models, tokenizers, tasks, sources"),
    ):
        monkeypatch.setenv(registry.PLUGINS, str(wrong))
        with pytest.raises(PluginError, match=said):
            registry.names("tasks")


def test_a_plugin_that_is_not_python_is_named(toys: Path) -> None:
    (toys / "tasks" / "toy.py").write_text("def")
    with pytest.raises(PluginError, match=r"toy\.py is not Python"):
        registry.summary("tasks", "toy")


FAMILY = """
from pipeline.config.section import Config
from pipeline.contracts import Family

class Toy(Family):
    options = {options}
    def build(self, config, spec): ...
    def objective(self, model, config): ...
    def generator(self, model, config, spec, parts): ...

FAMILY = {family}
"""


@pytest.mark.parametrize(
    ("family", "options", "said"),
    [
        ("None", "Config", "defines no FAMILY, an object of a subclass of Family, which pipeline/"),
        ("'masked'", "Config", "FAMILY is 'masked', and must be an object of a subclass of Family"),
        ("Toy", "Config", "FAMILY is <class .*Toy'>, and must be an object of"),
        ("Toy()", "dict", "must say with `options` .*a subclass of pipeline.config.Config"),
    ],
)
def test_a_family_that_is_none_is_told(
    family: str, options: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    name = f"toy_{abs(hash((family, options)))}"  # modules are imported once a process
    file = tmp_path / "models" / f"{name}.py"
    file.write_text(FAMILY.format(family=family, options=options))
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    with pytest.raises(RecipeError, match=f"generator.family='{name}': {file}.*{said}"):
        load_recipe("smoke", [f"generator.family={name}"], environment={})
    with pytest.raises(RecipeError, match="did you mean 'width'"):  # which it does not hide
        load_recipe("smoke", ["generator.widht=3"], environment={})


def test_a_source_that_is_none_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sources").mkdir()
    file = tmp_path / "sources" / "toy_source.py"
    file.write_text("SOURCE = 'reddit'")
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match=f"{file}: SOURCE is 'reddit', and must be a subclass of"):
        registry.part("sources", "toy_source", "SOURCE")


@pytest.mark.parametrize(
    "text", ["", "SOURCE = 'yes'\ndef example(tokens, rng): ...", "SOURCE = True"]
)
def test_a_task_that_is_none_is_told(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / f"toy_task_{len(text)}.py"
    file.write_text(text)
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match=f"{file} must define SOURCE, .*pipeline/tasks/README.md"):
        gives_source([file.stem])


def test_a_family_named_like_a_setting_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "width.py").touch()
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    with pytest.raises(
        RecipeError, match=r"generator: .*width\.py.*is a setting .*rename the file"
    ):
        load_recipe("smoke", environment={})


def test_a_plugin_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tasks").mkdir()
    file = tmp_path / "tasks" / "hopeless.py"
    file.write_text('"""A task that needs what is not there."""\nimport not_a_package\n')
    monkeypatch.setenv(registry.PLUGINS, str(tmp_path))
    with pytest.raises(PluginError, match=rf"{file} cannot be imported: ModuleNotFoundError"):
        registry.load("tasks", "hopeless")
