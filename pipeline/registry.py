"""One registry for every kind of part: a file's name is its registration.

    registry.names("sources")               # ["coco", "emoji", "folder", ...]
    registry.load("tasks", "completion")    # the module pipeline/tasks/completion.py
    registry.part("models", "masked", "FAMILY")     # what pipeline/models/masked.py calls FAMILY
    registry.summary("sources", "coco")     # what the file says of itself, without importing it

To add a model family, a tokenizer, a task or a source, add one file to the folder of its kind.
Names that start with an underscore are helpers, not registrations.

The file may also lie outside Tessera. The environment variable TESSERA_PLUGINS lists directories,
separated as in PATH; each holds one or more of the folders models/, tokenizers/, tasks/, sources/:

    export TESSERA_PLUGINS=/opt/plugins          # with the file sources/reddit.py in it
    tessera ingest reddit --help

A plugin file is code, and Tessera runs it with your rights: list only directories that nobody else
can write to. It is imported as a module of its kind's package (pipeline.data.sources.reddit), so
what it defines can be sent to Ray's workers, and a helper file beside it is imported in the same
way (pipeline.data.sources._reddit_api). A local Ray hands the variable on to its workers; on a
cluster, set it on every node. A name that is taken is an error, never an override.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import os
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.errors import PluginError, RecipeError

PACKAGES = {
    "models": "pipeline.models",
    "tokenizers": "pipeline.tokenizers",
    "tasks": "pipeline.tasks",
    "sources": "pipeline.data.sources",
}
"""The package of each kind. A plugin directory's folders are called like the kinds."""

INTERFACES = {"FAMILY": "Family", "TOKENIZER": "TokenizerKind", "SOURCE": "Source"}
"""By constant, the class of pipeline/contracts.py that a file's object is of. It is imported when
it is needed, since contracts speak of settings, and settings of the registry."""

PLUGINS = "TESSERA_PLUGINS"
_ROOT = Path(__file__).parents[1]


def names(kind: str) -> list[str]:
    """Everything registered under `kind`, sorted.

    Raises:
        PluginError: TESSERA_PLUGINS is wrong, or two files have the same name.
    """
    return sorted(name for name in _files(kind) if not name.startswith("_"))


def load(kind: str, name: str) -> ModuleType:
    """Import the file that is registered as `name`.

    Raises:
        RecipeError: nothing of that name exists; the message lists what does.
        PluginError: TESSERA_PLUGINS is wrong, two files have the same name, or a plugin cannot be
            imported.
    """
    path = _path(kind, name)
    package = importlib.import_module(PACKAGES[kind])
    package.__path__ = search_path(package.__name__)
    try:
        return importlib.import_module(f"{package.__name__}.{name}")
    except Exception as error:
        if path.is_relative_to(_ROOT):
            raise
        raise PluginError(
            f"{path} cannot be imported: {type(error).__name__}: {error}. Mend the plugin, or take "
            f"its directory out of {PLUGINS}"
        ) from error


def part(kind: str, name: str, constant: str) -> Any:
    """What the file that is registered as `name` defines under the name of a constant.

    Raises:
        PluginError: the file defines no such constant, or one that is something else.
        RecipeError, PluginError: as `load` does.
    """
    module = load(kind, name)
    found = getattr(module, constant, None)
    if found is None:
        raise PluginError(f"{module.__file__} defines no {constant}, {_described(constant)}")
    if not _is_of(found, constant):
        raise PluginError(
            f"{module.__file__}: {constant} is {found!r}, and must be {_described(constant)}"
        )
    if constant != "SOURCE" and not _is_section(getattr(found, "options", None)):
        raise PluginError(
            f"{module.__file__}: {constant} must say with `options` which class its section of a "
            "recipe is, a subclass of pipeline.config.Config"
        )
    return found


def summary(kind: str, name: str) -> str:
    """The first paragraph of a file's docstring, in one line; the file is parsed, not imported.

    Raises:
        RecipeError: nothing of that name exists; the message lists what does.
        PluginError: the file is not Python, or `names` raises it.
    """
    path = _path(kind, name)
    try:
        docstring = ast.get_docstring(ast.parse(path.read_bytes(), str(path)))
    except (SyntaxError, ValueError) as error:
        raise PluginError(f"{path} is not Python: {error}") from error
    return " ".join((docstring or "").partition("\n\n")[0].split())


def search_path(package: str) -> list[str]:
    """The `__path__` of a kind's package: its own folder, then those of the plugin directories."""
    (kind,) = (kind for kind, known in PACKAGES.items() if known == package)
    return [str(folder) for folder in _folders(kind)]


def _described(constant: str) -> str:
    """What a constant must be, and where that is said."""
    interface = f"a subclass of {INTERFACES[constant]}, which pipeline/contracts.py describes"
    return interface if constant == "SOURCE" else f"an object of {interface}"


def _is_of(found: object, constant: str) -> bool:
    """Whether a constant's value has the base class that it must have."""
    interface = getattr(importlib.import_module("pipeline.contracts"), INTERFACES[constant])
    made_by = found if constant == "SOURCE" else type(found)
    return isinstance(made_by, type) and interface in made_by.__mro__


def _is_section(found: object) -> bool:
    config = importlib.import_module("pipeline.config.section").Config
    return isinstance(found, type) and issubclass(found, config)


def _path(kind: str, name: str) -> Path:
    known = names(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise RecipeError(
            f"no {kind.rstrip('s')} is called {name!r}; there are: {', '.join(known)}.{hint}"
        )
    return _files(kind)[name]


def _files(kind: str) -> dict[str, Path]:
    """Every module of a kind by its name, helpers included."""
    found: dict[str, Path] = {}
    for folder in _folders(kind):
        for path in folder.glob("*.py"):
            other = found.setdefault(path.stem, path)
            if other != path and path.stem != "__init__":
                raise PluginError(f"{other} and {path} have the same name: rename one")
    del found["__init__"]
    return found


def _folders(kind: str) -> list[Path]:
    own = _ROOT.joinpath(*PACKAGES[kind].split("."))
    return [own, *(d / kind for d in _plugin_directories() if (d / kind).is_dir())]


def _plugin_directories() -> list[Path]:
    directories = list(map(Path, filter(None, os.environ.get(PLUGINS, "").split(os.pathsep))))
    for directory in directories:
        if not directory.is_absolute() or not directory.is_dir():
            raise PluginError(
                f"{PLUGINS} names {directory}, which is not the absolute path of a directory"
            )
        if not any((directory / kind).is_dir() for kind in PACKAGES):
            raise PluginError(
                f"{PLUGINS} names {directory}, which has none of the folders {', '.join(PACKAGES)}"
            )
    return directories
