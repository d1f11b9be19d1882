"""Bundles that cannot be drawn with are told apart before anything is drawn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from pipeline.artifacts import WEIGHTS, file_digest
from pipeline.bundles.bundle import check_bundle, load_generator
from pipeline.errors import BundleError


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def test_a_file_that_is_not_the_manifests_is_named(bundle: Path) -> None:
    check_bundle(bundle)
    (bundle / WEIGHTS).write_bytes((bundle / WEIGHTS).read_bytes()[:-8])
    with pytest.raises(BundleError, match=WEIGHTS):
        check_bundle(bundle)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(
    value: float, bundle: Path, pretrained_cache: Path
) -> None:
    weights = load_file(bundle / WEIGHTS)
    name = next(name for name, weight in weights.items() if weight.is_floating_point())
    weights[name].view(-1)[0] = value
    save_file(weights, bundle / WEIGHTS)
    manifest = json.loads((bundle / "config.json").read_text())
    manifest["files"][WEIGHTS] = file_digest(bundle / WEIGHTS)
    (bundle / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"are not finite numbers.*its training diverged"):
        load_generator(bundle, pretrained_cache=pretrained_cache)
