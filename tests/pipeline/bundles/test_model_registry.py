"""The model registry against real MLflow on sqlite."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException

from pipeline import __version__
from pipeline.artifacts import bundle_digest
from pipeline.bundles.decisions import Verdict
from pipeline.bundles.registry import ModelRegistry, has_champion, lineage, resolve_model
from pipeline.config import Recipe, load_recipe
from pipeline.errors import BundleError, ResourceError
from pipeline.tracking.runs import Tracker

FIRST = Verdict(True, over=None, reasons=("it is the first",))


def register(home: Path, bundle: Path, **tags: str) -> tuple[ModelRegistry, str]:
    tracker, registry = Tracker(home), ModelRegistry(home)
    with tracker.run("made") as handle:
        return registry, registry.register(bundle, model_name="tiny", handle=handle, tags=tags)


@pytest.fixture(autouse=True)
def database_under_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def home(new_home: Callable[[str], Path]) -> Path:
    return new_home("home")


def test_two_homes_in_one_process_keep_apart(
    home: Path, new_home: Callable[[str], Path], tiny_bundles: dict[str, Path]
) -> None:
    first = ModelRegistry(other := new_home("other"))
    second, version = register(home, tiny_bundles["gan"])
    second.promote("tiny", version, FIRST)
    assert "MLFLOW_TRACKING_URI" not in os.environ
    assert first.champion("tiny") is None
    found = resolve_model("models:/tiny@champion", home=home)
    assert (found.name, found.version) == ("tiny", version)
    with pytest.raises(BundleError, match="tessera demo"):
        resolve_model("models:/tiny@champion", home=other)


def test_a_bundle_is_registered_and_downloaded_once(
    home: Path, tiny_bundles: dict[str, Path]
) -> None:
    registry, version = register(home, tiny_bundles["gan"])
    assert register(home, tiny_bundles["gan"])[1] == version
    assert not has_champion(home, "tiny")
    registry.promote("tiny", version, FIRST)
    assert has_champion(home, "tiny")
    found = resolve_model(f"models:/tiny/{version}", home=home)
    assert [p.name for p in (home / "models").iterdir()] == [found.path.name]
    weights = found.path / "model.safetensors"
    before = weights.stat().st_mtime_ns
    champion = registry.champion("tiny")
    assert champion == found and weights.stat().st_mtime_ns == before


def test_a_silent_registry_is_not_one_without_a_champion(
    home: Path, tiny_bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, _ = register(home, tiny_bundles["gan"])
    assert registry.champion("tiny") is None, "a version, but no alias"

    def silent(*_: object) -> None:
        raise MlflowException("connection refused")

    monkeypatch.setattr(registry.client, "get_model_version_by_alias", silent)
    with pytest.raises(ResourceError, match="does not say which version of tiny"):
        registry.champion("tiny")


def test_a_version_says_what_it_was_made_from_and_how_it_was_judged(
    home: Path, tiny_bundles: dict[str, Path]
) -> None:
    recipe = load_recipe("smoke", environment={})
    made_from = lineage(recipe, {"home:a": "11", "home:b": "22"})
    register(home, tiny_bundles["masked"])
    registry, version = register(home, tiny_bundles["gan"], **made_from)
    verdict = Verdict(False, "1", ("no: KID rose",), "runs:/abc")
    registry.record("tiny", version, verdict)
    newest, oldest = registry.versions("tiny")
    assert (str(newest.version), newest.tags["digest"]) == (
        version,
        bundle_digest(tiny_bundles["gan"]),
    )
    assert newest.tags["recipe"] == "smoke" and newest.tags["evaluation"] == "runs:/abc"
    assert Recipe.model_validate(json.loads(newest.tags["settings"])) == recipe
    assert newest.tags["code_version"].startswith(__version__)
    assert Verdict.from_json(newest.tags["decision"]) == verdict
    assert len(made_from["data_digest"]) == 64
    assert lineage(recipe, {"home:a": "11"})["data_digest"] == "11"
    assert registry.standing("tiny").aliases == {"candidate": version}
    assert register(home, tiny_bundles["masked"])[1] == str(oldest.version)
    assert registry.standing("tiny").aliases == {"candidate": str(oldest.version)}
    assert registry.versions("nobody") == []
