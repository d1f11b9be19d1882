"""The model registry against real MLflow on sqlite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipeline.bundles.registry import ModelRegistry, has_champion, resolve_model
from pipeline.errors import BundleError, ResourceError
from pipeline.tracking.runs import Tracker


def register(home: Path, bundle: Path) -> tuple[ModelRegistry, str]:
    tracker, registry = Tracker(home), ModelRegistry(home)
    with tracker.run("made") as handle:
        return registry, registry.register(bundle, model_name="tiny", handle=handle)


@pytest.fixture(autouse=True)
def database_under_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_two_homes_in_one_process_keep_apart(tmp_path: Path, tiny_bundles: dict[str, Path]) -> None:
    first = ModelRegistry(tmp_path / "first")
    second, version = register(tmp_path / "second", tiny_bundles["gan"])
    second.set_champion("tiny", version)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert first.champion("tiny") is None
    found = resolve_model("models:/tiny@champion", home=tmp_path / "second")
    assert (found.name, found.version) == ("tiny", version)
    with pytest.raises(BundleError, match="tessera demo"):
        resolve_model("models:/tiny@champion", home=tmp_path / "first")


def test_a_bundle_is_registered_and_downloaded_once(
    tmp_path: Path, tiny_bundles: dict[str, Path]
) -> None:
    registry, version = register(tmp_path, tiny_bundles["gan"])
    assert register(tmp_path, tiny_bundles["gan"])[1] == version
    assert not has_champion(tmp_path, "tiny")
    registry.set_champion("tiny", version)
    assert has_champion(tmp_path, "tiny")
    found = resolve_model(f"models:/tiny/{version}", home=tmp_path)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [found.path.name]
    weights = found.path / "model.safetensors"
    before = weights.stat().st_mtime_ns
    champion = registry.champion("tiny")
    assert champion == found and weights.stat().st_mtime_ns == before


def test_a_silent_registry_is_not_one_without_a_champion(
    tmp_path: Path, tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, _ = register(tmp_path, tiny_bundles["gan"])
    assert registry.champion("tiny") is None, "a version, but no alias"

    def silent(*_: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(registry.client, "get_model_version_by_alias", silent)
    with pytest.raises(ResourceError, match="does not say which version of tiny"):
        registry.champion("tiny")
