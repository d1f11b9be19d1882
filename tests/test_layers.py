"""The packages of pipeline/ are layered: no import points up or is circular, no folder is large."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from jobs import file_map

ROOT = Path(__file__).parents[1]
LAYERS = (
    ("errors",),
    ("registry", "progress", "runtime", "artifacts"),
    ("config",),
    ("contracts",),
    ("objective", "metrics"),
    ("tracking", "tasks", "text", "tokenizers", "images", "data.shards"),
    ("data.sources", "data.preprocess", "models"),
    ("bundles",),
    ("evaluation",),
    ("training",),
    ("chain",),
)
"""The packages and modules of pipeline/, the lowest layer first. Each may import itself and those
of lower layers, nothing else. Each folder of data/ is a package here. README.md describes each."""
MOST_MODULES = 13  # of a folder, its __init__.py included


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "pipeline").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> Iterator[tuple[str, bool]]:
    """The modules of pipeline that a file imports when it runs, and whether at its top level; what
    types alone need is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing:
            continue
        module = node.module or ""
        if module.split(".")[0] != "pipeline":
            continue
        for alias in node.names:
            inner = f"{module}.{alias.name}"
            yield (inner if inner in known else module), id(node) in top


def package_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[1:3] if parts[1:2] == ["data"] else parts[1:2])


def test_no_import_points_up() -> None:
    layer = {package: number for number, packages in enumerate(LAYERS) for package in packages}
    known = modules()
    wrong = []
    for module, path in known.items():
        here = package_of(module)
        if here in ("", "data"):
            continue
        for other, _ in imports(path, known):
            there = package_of(other)
            if there not in ("", here) and layer[there] >= layer[here]:
                wrong.append(f"{module} imports {other}")
    assert not wrong, "; ".join(wrong)


def test_no_imports_go_in_a_circle() -> None:
    known = modules()
    needs = {m: {o for o, top in imports(p, known) if top and o != m} for m, p in known.items()}
    while loose := [m for m, others in needs.items() if not others & needs.keys()]:
        for module in loose:
            del needs[module]
    assert not needs, f"these import each other: {', '.join(sorted(needs))}"


def test_no_folder_has_too_many_modules() -> None:
    for folder in {path.parent for path in modules().values()}:
        count = len(list(folder.glob("*.py")))
        assert count <= MOST_MODULES, f"{folder.relative_to(ROOT)} has {count} modules"


def test_the_readme_maps_every_file() -> None:
    mapped = {ROOT / folder for folder in file_map.FOLDERS}
    there = {
        p.parent
        for package in ("pipeline", "jobs", "serve")
        for p in (ROOT / package).rglob("*.py")
    }
    assert there == mapped, "jobs/file_map.py: FOLDERS"
    readme = file_map.README.read_text(encoding="utf-8")
    assert file_map.file_map() in readme, f"README.md's map is out of date: {file_map.COMMAND}"


def test_pipeline_knows_neither_commands_nor_service() -> None:
    for package, others in (("pipeline", ("jobs", "serve")), ("serve", ("jobs",))):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom):
                    assert (node.module or "").split(".")[0] not in others, path
