"""Pixels between their forms: the range [-1, 1], PNG files, Pillow images; the gradient loss."""

from __future__ import annotations

import io

import numpy as np
import torch
from corpus import noise
from PIL import Image

from pipeline.images.pixels import encode_png, gradient_l1, to_float, to_pil, to_uint8


def test_the_range_round_trips_every_byte_and_clamps() -> None:
    every = torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256)
    floats = to_float(every)
    assert floats.min() == -1 and floats.max() == 1 and floats.dtype == torch.float32
    assert torch.equal(to_uint8(floats), every)
    assert to_uint8(torch.tensor([-7.0, 7.0, 0.0])).tolist() == [0, 255, 128]
    assert torch.equal(every, torch.arange(256, dtype=torch.uint8).expand(1, 3, 2, 256))


def test_png_keeps_pixels_and_metadata_of_any_language() -> None:
    image = np.asarray(noise(16, 16)).transpose(2, 0, 1)
    said = {"prompt": "一个红苹果", "seed": "7"}
    opened = Image.open(io.BytesIO(encode_png(image, said)))
    np.testing.assert_array_equal(np.asarray(opened).transpose(2, 0, 1), image)
    assert {name: str(opened.info[name]) for name in said} == said


def test_to_pil_takes_arrays_and_tensors() -> None:
    image = np.asarray(noise(8, 4)).transpose(2, 0, 1)
    assert to_pil(image).tobytes() == to_pil(torch.from_numpy(image.copy())).tobytes()


def test_gradient_l1_sees_edges_and_not_brightness() -> None:
    edge = torch.zeros(2, 3, 8, 8)
    edge[:, :, :, 4:] = 1
    other = torch.stack([edge[0] + 0.5, torch.full_like(edge[1], 0.5)])
    same, different = gradient_l1(edge, other)
    assert same == 0 and different > 0.1
