"""serve/README.md against the code: it has every endpoint, field, setting, file and error code."""

from __future__ import annotations

import re
from pathlib import Path

import serve.replica
from pipeline.config import ServeConfig
from serve.api import create_api
from serve.schemas import EditRequest, ImageRequest, VariationRequest
from serve.settings import ApiKey, ServiceConfig

FOLDER = Path(serve.replica.__file__).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_field_and_setting_is_explained() -> None:
    shapes = (ImageRequest, EditRequest, VariationRequest, ServiceConfig)
    for name in {name for shape in shapes for name in shape.model_fields}:
        assert re.search(rf"^\|[^|]*`{name}`", README, re.M), name
    for name in ApiKey.model_fields:
        assert name in README


def test_every_setting_of_replicas_is_explained() -> None:
    for name in ServeConfig.model_fields:
        assert re.search(rf"^\|[^|]*`serve\.{name}`", README, re.M), name


def test_every_file_is_on_the_map() -> None:
    there = {path.name for path in FOLDER.glob("*.*")} - {"__init__.py", "README.md"}
    (table,) = re.findall(r"^### Where what is\n(.*?)^##", README, re.M | re.S)
    assert set(re.findall(r"`(\w+\.\w+)`", table)) == there


def test_every_error_code_is_listed() -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"', sources)) - {"http_error"}
    codes |= set(re.findall(r'"(invalid_\w+|unknown_\w+|missing_\w+)"', sources))
    codes.discard("invalid_request_error")  # a type, not a code
    assert len(codes) > 18
    for code in codes:
        assert f"`{code}`" in README, code


def test_every_endpoint_is_listed() -> None:
    for path in create_api(_NoPool()).openapi()["paths"]:  # type: ignore[arg-type]
        assert path.replace("/{name}", "") in README, path


class _NoPool:
    """Enough of a pool to describe the application."""
