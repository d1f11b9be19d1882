"""No model is judged through features that it was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifacts import ASSETS, file_digest
from pipeline.config import TokenizerConfig
from pipeline.errors import RecipeError
from pipeline.evaluation.features import FeaturesIdentity, ImageNetFeatures, imagenet_identity
from pipeline.evaluation.judges import check_independent
from pipeline.evaluation.judges.independence import trained_on
from pipeline.evaluation.judges.judge import Judge
from pipeline.training.tokenizer import features_used


class Through(Judge):
    """A judge that sees through given features."""

    name, digest = "clip", ""

    def __init__(self, features: FeaturesIdentity | None) -> None:
        self.trained_on = features


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def record(directory: Path, **values: object) -> None:
    """Change a manifest."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("name", ["efficientnet-lite0", "under-another-name"])
def test_features_of_the_tokenizers_loss_are_refused(bundle: Path, name: str) -> None:
    record(bundle / "tokenizer", pretrained_features={name: imagenet_identity().digest})
    says = rf"evaluate\.features=efficientnet-lite0 .*efficientnet-lite0 .*tokenizer of .*{name}"
    with pytest.raises(RecipeError, match=says):
        check_independent(ImageNetFeatures(128), bundle)
    with pytest.raises(RecipeError, match=r"evaluate\.judges: clip"):
        check_independent(Through(imagenet_identity()), bundle / "tokenizer")


def test_features_of_the_generators_loss_are_refused(bundle: Path) -> None:
    record(bundle, pretrained_features={"efficientnet-lite0": ""})
    with pytest.raises(RecipeError, match=r"the generator of .* was trained on efficientnet-lite0"):
        check_independent(Through(imagenet_identity()), bundle)


def test_a_dual_encoder_that_reads_the_models_captions_is_refused(bundle: Path) -> None:
    read_by = json.loads((bundle / "config.json").read_text())["encoder_identity"]["id"]
    with pytest.raises(RecipeError, match="the generator"):
        check_independent(Through(FeaturesIdentity(read_by, "0" * 64)), bundle)


def test_other_features_and_judges_trained_from_scratch_pass(bundle: Path) -> None:
    record(bundle / "tokenizer", pretrained_features={"hed-vgg16": "1" * 64})
    assert check_independent(ImageNetFeatures(128), bundle) == ""
    assert check_independent(Through(None), bundle) == ""


def test_a_manifest_without_a_record_is_read_by_its_settings() -> None:
    """The shipped base is older than the record."""
    remark = check_independent(ImageNetFeatures(128), ASSETS / "base")
    assert "does not record" in remark and "hed-vgg16" in remark
    with pytest.raises(RecipeError, match="hed-vgg16"):
        check_independent(Through(FeaturesIdentity("hed-vgg16", "1" * 64)), ASSETS / "base")


def test_training_records_its_perceptual_loss_and_its_sources(tmp_path: Path) -> None:
    file = tmp_path / "vgg.safetensors"
    save_file({"conv1_1.weight": torch.zeros(1)}, file)
    config = TokenizerConfig(perceptual_weight=0.1, perceptual_features=str(file))
    used = features_used(config, cache=tmp_path, source=ASSETS / "base" / "tokenizer")
    assert used == {"hed-vgg16": "", str(file): file_digest(file)}
    assert features_used(TokenizerConfig(), cache=tmp_path) == {}


def test_what_a_bundle_was_trained_on_names_the_part(bundle: Path) -> None:
    record(bundle / "tokenizer", pretrained_features={"hed-vgg16": "1" * 64})
    found = [(part, features.name) for part, features in trained_on(bundle)]
    assert found[0] == ("the tokenizer", "hed-vgg16") and found[1][0] == "the generator"
