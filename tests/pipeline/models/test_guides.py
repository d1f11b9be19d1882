"""The guides for a family and a task name what there is, and all that their toys use."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.contracts import Family
from pipeline.tasks import Example

ROOT = Path(__file__).parents[3]
GUIDES = {
    "models": ROOT / "tests/plugins/models/independent.py",
    "tasks": ROOT / "tests/plugins/tasks/lower_half.py",
}
FOR_TYPES_ALONE = {
    "GeneratorConfig", "ModelParts", "ModelSpec", "GenerationRequest", "OnStep", "masked_mean",
    "sampling",
}  # fmt: skip


def guide(kind: str) -> str:
    return (ROOT / "pipeline" / kind / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", GUIDES)
def test_every_file_that_a_guide_names_is_there(kind: str) -> None:
    named = set(re.findall(r"`([\w./]+/[\w./]+|\w+\.py)`", guide(kind)))
    assert str(GUIDES[kind].relative_to(ROOT)) in named
    for name in named - {f"{kind}/"}:
        here = [ROOT / name, ROOT / "pipeline" / kind / name]
        here.append(ROOT / "pipeline" / kind / "decoding" / name)
        assert any(path.exists() for path in here), name


@pytest.mark.parametrize("kind", GUIDES)
def test_a_guide_names_all_of_tessera_that_its_toy_uses(kind: str) -> None:
    tree = ast.parse(GUIDES[kind].read_text(encoding="utf-8"))
    used = {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipeline")
        for alias in node.names
    }
    used |= {
        ("pipeline.models.decoding.sampling", node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sampling"
    }
    assert used
    for module, name in used:
        if name not in FOR_TYPES_ALONE:
            assert f"`{name}`" in guide(kind), name
            path = f"{module.replace('.', '/')}.py"
            packaged = f"{module.replace('.', '/')}/__init__.py"
            path = packaged if (ROOT / packaged).is_file() else path
            assert f"`{path}`" in guide(kind) or module == "pipeline.config.section", path


def test_the_names_in_the_guides_are_those_of_the_code() -> None:
    needed = {
        name for name in dir(Family) if getattr(vars(Family).get(name), "__isabstractmethod__", 0)
    }
    assert needed == {"build", "objective", "generator"}
    for name in {*needed, "options", "reads", "reads_source", "shape_fields", "unread", "check"}:
        assert name in {*dir(Family), *Family.__annotations__} and f"`{name}`" in guide("models")
    for name in Example.__annotations__:
        assert f"`{name}`" in guide("tasks")
