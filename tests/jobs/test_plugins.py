"""A family, a task and a tokenizer, each one file of a plugin directory, from recipe to service.

Nothing of Tessera is edited: the files lie in tests/plugins, and TESSERA_PLUGINS names it.
"""

from __future__ import annotations

import json
import os
import subprocess
import urllib.request
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import TESSERA, tessera_serve

from pipeline import registry

PLUGINS = Path(__file__).parents[1] / "plugins"
SETTINGS = (
    "generator.family=independent", "generator.independent.hidden=16",
    "generator.tasks=[text_to_image,lower_half]",
    "tokenizer.name=mean_colour", "tokenizer.mean_colour.bits=2",
    "aligner={source: asset:aligner}", "evaluate.judges=[aligner]", "promote.model_name=plugins",
    "promote.unjudged=true",
)  # fmt: skip


def tessera(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*TESSERA, *arguments, "--home", str(home)], capture_output=True, text=True, timeout=400,
        check=False, env={**os.environ, registry.PLUGINS: str(PLUGINS)},
    )  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pretrained_cache: Path) -> Path:
    path = tmp_path_factory.mktemp("plugins")
    (path / "pretrained").symlink_to(pretrained_cache)
    return path


@pytest.fixture(scope="module")
def outcome(home: Path) -> dict[str, Any]:
    """What `tessera retrain` prints: on Ray, whose workers import the plugins too."""
    trained = tessera("retrain", "smoke", "--json", *SETTINGS, home=home)
    assert trained.returncode == 0, trained.stderr
    found: dict[str, Any] = json.loads(trained.stdout)
    return found


def test_what_plugins_made_is_trained_judged_and_promoted(outcome: dict[str, Any]) -> None:
    assert outcome["promoted"]
    manifest = json.loads((Path(outcome["bundle"]) / "config.json").read_text())
    assert manifest["generator"]["family"] == "independent"
    assert manifest["generator"]["independent"] == {"hidden": 16}
    assert manifest["generator"]["tasks"] == ["text_to_image", "lower_half"]
    assert manifest["spec"]["codebook_size"] == 4**3
    assert outcome["metrics"]["candidate"]["validation_loss"] > 0


@pytest.fixture(scope="module")
def drawn(outcome: dict[str, Any], home: Path) -> Image.Image:
    """An image by `tessera generate`."""
    out = home / "apple.png"
    done = tessera(
        "generate", "a red apple", "--model", "models:/plugins@champion", "--out", str(out),
        "--seed", "4", home=home,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Image.open(out)


def test_it_draws_without_a_server(drawn: Image.Image) -> None:
    assert drawn.size == (64, 64)


@pytest.mark.slow
def test_the_service_draws_the_same(drawn: Image.Image, home: Path) -> None:
    arguments = "models:/plugins@champion", "--home", str(home)
    environment = {**os.environ, registry.PLUGINS: str(PLUGINS)}
    with tessera_serve(*arguments, ready_timeout_s=120, env=environment) as (url, _):
        request = urllib.request.Request(
            f"{url}/v1/images/generations",
            json.dumps({"prompt": "a red apple", "seed": 4}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            served = json.load(answer)["data"][0]["b64_json"]
    assert Image.open(BytesIO(b64decode(served))).tobytes() == drawn.tobytes()


def test_mistakes_in_its_section_are_explained(home: Path) -> None:
    said = tessera("plan", "smoke", "generator.family=independant", home=home)
    assert said.returncode == 1 and "Did you mean 'independent'" in said.stderr
    said = tessera("plan", "smoke", *SETTINGS, "generator.independent.hiden=3", home=home)
    assert said.returncode == 1 and "did you mean 'hidden'" in said.stderr
    said = tessera("plan", "smoke", *SETTINGS, "generator.tasks=[upper_half]", home=home)
    assert said.returncode == 1 and "lower_half" in said.stderr


@pytest.mark.slow
def test_its_settings_are_searched(outcome: dict[str, Any], home: Path) -> None:
    space = "generator.independent.hidden: {choice: [8, 16]}"
    tune = f"tune={{num_trials: 2, grace_steps: 10, space: {{{space}}}}}"
    searched = tessera("tune", "smoke", "--json", *SETTINGS, tune, home=home)
    assert searched.returncode == 0, searched.stderr
    trials = json.loads(searched.stdout)["trials"]
    assert {trial["settings"]["generator.independent.hidden"] for trial in trials} <= {8, 16}
