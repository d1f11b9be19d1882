"""Batches of captioned images: padding, and which caption and view a draw picks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.training.datasets import CaptionedDataset, CaptionStates


def test_captions_are_padded_and_views_are_drawn(tmp_path: Path) -> None:
    np.save(tmp_path / "states.npy", np.arange(10, dtype=np.float16).reshape(5, 2))
    np.save(tmp_path / "offsets.npy", np.array([0, 2, 5]))
    captions = CaptionStates(tmp_path, max_tokens=4)
    tokens = np.arange(2 * 3 * 4, dtype=np.uint16).reshape(2, 3, 4)
    data = CaptionedDataset(
        arrays={"image_tokens": tokens}, with_views=frozenset({"image_tokens"}),
        caption_ids=[np.array([0]), np.array([1, 0])], captions=captions,
        style=np.array([0, 1]), group=np.array([0, 1]),
    )  # fmt: skip
    first = data.batch(np.array([0, 1]), None)
    assert first["image_tokens"].tolist() == tokens[:, 0].tolist()
    assert first["caption_mask"].tolist() == [[True, True, False, False], [True, True, True, False]]
    assert first["caption_states"][0, 2:].abs().sum() == 0
    drawn = [data.batch(np.array([1]), np.random.default_rng(i).random((1, 2))) for i in range(40)]
    assert {tuple(d["image_tokens"][0].tolist()) for d in drawn} == set(map(tuple, tokens[1]))
    assert {int(d["caption_mask"].sum()) for d in drawn} == {2, 3}
