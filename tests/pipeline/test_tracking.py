"""The tracker against real MLflow on sqlite."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipeline.errors import BundleError, ResourceError
from pipeline.tracking import Tracker, resolve_model


def test_two_homes_in_one_process_keep_apart(
    tmp_path: Path, tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    first, second = Tracker(tmp_path / "first"), Tracker(tmp_path / "second")
    with second.run("made") as handle:
        version = second.register(tiny_bundles["gan"], model_name="tiny", handle=handle)
    second.set_champion("tiny", version)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert first.champion("tiny") is None
    found = resolve_model("models:/tiny@champion", home=tmp_path / "second")
    assert (found.name, found.version) == ("tiny", version)
    with pytest.raises(BundleError, match="tessera demo"):
        resolve_model("models:/tiny@champion", home=tmp_path / "first")


def test_a_silent_registry_is_not_one_without_a_champion(
    tmp_path: Path, tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(tmp_path)
    with tracker.run("made") as handle:
        tracker.register(tiny_bundles["gan"], model_name="tiny", handle=handle)
    assert tracker.champion("tiny") is None, "a version, but no alias"

    def silent(*_: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(tracker.client, "get_model_version_by_alias", silent)
    with pytest.raises(ResourceError, match="does not say which version of tiny"):
        tracker.champion("tiny")
