"""Encoding with Ray Data: in the order of the input, what the models themselves would give."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from test_preprocess import CONFIG, DATA, sample

from pipeline.config import AugmentConfig, CaptionEncoderConfig, EncodeConfig
from pipeline.data.preprocess.encode import encode_captions, encode_images
from pipeline.data.preprocess.job import preprocess
from pipeline.data.shards.writer import write_shards
from pipeline.images.pixels import to_float
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.tokenizers._saved import load_tokenizer
from pipeline.training.datasets import CaptionStates, captioned_dataset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    """150 images of 64 pixels per side in three files."""
    folder = tmp_path_factory.mktemp("encode")
    write_shards(map(sample, range(150)), folder / "set", max_bytes=160_000)
    config = CONFIG.model_copy(update={"image_size": 64})
    preprocess([str(folder / "set")], folder / "out", data=DATA, config=config)
    return folder / "out" / "pixels"


def test_image_tokens_are_the_tokenizers_own_in_the_order_of_the_pixels(
    pixels: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    config = EncodeConfig(num_views=2, batch_size=16, augment=AugmentConfig(flip=1.0))
    found = encode_images(pixels, tiny_bundle / "tokenizer", tmp_path, config=config, image_size=64)
    rows = pq.read_table(pixels)
    assert found == len(rows) == 150 and len(list(pixels.glob("*.parquet"))) > 2
    written = pq.read_table(tmp_path)
    assert written["key"].to_pylist() == rows["key"].to_pylist()
    tokens = np.stack([np.frombuffer(t, np.uint16) for t in written["image_tokens"].to_pylist()])
    images = torch.from_numpy(
        np.stack([np.frombuffer(i, np.uint8) for i in rows["image"].to_pylist()])
    ).reshape(-1, 3, 64, 64)
    tokenizer = load_tokenizer(tiny_bundle / "tokenizer")
    with torch.inference_mode():
        direct = tokenizer.encode(to_float(images)), tokenizer.encode(to_float(images.flip(3)))
    for view, expected in zip(tokens.reshape(150, 2, 64).swapaxes(0, 1), direct, strict=True):
        assert (view == expected.numpy()).mean() > 0.97, "bfloat16 moves a few over an edge"


def test_caption_states_are_the_encoders_own_and_rows_find_theirs(
    pixels: Path, tiny_bundle: Path, encoder: HFCaptionEncoder, pretrained_cache: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = CaptionEncoderConfig()
    assert encode_captions(pixels, tmp_path / "c", config=config, cache=pretrained_cache) == 300
    encode_images(
        pixels, tiny_bundle / "tokenizer", tmp_path / "t", config=EncodeConfig(), image_size=64
    )
    data = captioned_dataset(
        tmp_path / "t", tmp_path / "c", split=("train", "test", "validation"), styles=("noto",),
        max_tokens=config.max_tokens, num_tokens=64,
    )  # fmt: skip
    assert isinstance(data.captions, CaptionStates) and len(data) == 150
    rows = np.array([149, 7, 80])
    chinese = data.batch(rows, np.array([[0.9, 0.0]] * 3))
    states, mask = encoder.encode([f"东西 {i}" for i in rows])
    length = int(mask.sum(1).max())
    assert torch.equal(chinese["caption_mask"][:, :length], mask[:, :length])
    torch.testing.assert_close(
        chinese["caption_states"][:, :length][mask[:, :length]].float(),
        states[:, :length][mask[:, :length]].float(), atol=0.02, rtol=0.02,
    )  # fmt: skip
    assert chinese["group"].tolist() == rows.tolist(), "groups are numbered in order"
