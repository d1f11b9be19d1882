"""Real things that the tests of the pipeline share: the shipped pictures in two forms."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from pipeline.artifacts import ASSETS
from pipeline.config import PreprocessConfig
from pipeline.data.preprocess.decode import decode
from pipeline.text.caption_encoder import HFCaptionEncoder

SUBJECTS = 64


@pytest.fixture(scope="session")
def icons() -> list[dict[str, Any]]:
    """64 subjects, each as Noto and as Twemoji drew it, in the columns of preprocessed Parquet."""
    rows = []
    for shard in sorted((ASSETS / "emoji").glob("*.tar*")):
        with tarfile.open(shard) as tar:
            while member := tar.next():
                if member.name.endswith(".json"):
                    record = json.load(tar.extractfile(member))
                    if zlib.crc32(record["group"].encode()) % 25 == 0:
                        picture = tar.extractfile(tar.next()).read()
                        rows.append(_row(record, member.name.removesuffix(".json"), picture))
    rows.sort(key=lambda row: (row["style"], row["group"]))
    half = len(rows) // 2
    return rows[:SUBJECTS] + rows[half : half + SUBJECTS]


def _row(record: dict[str, Any], key: str, picture: bytes) -> dict[str, Any]:
    wanted = {name: record[name] for name in ("group", "style", "captions")}
    return {"key": key, "image": decode(picture, PreprocessConfig()).tobytes(), **wanted}


@pytest.fixture(scope="session")
def icon_images(icons: list[dict[str, Any]]) -> Tensor:
    """uint8 (128, 3, 64, 64): 64 Noto pictures, then 64 Twemoji ones."""
    flat = bytearray(b"".join(row["image"] for row in icons))
    return torch.frombuffer(flat, dtype=torch.uint8).reshape(-1, 3, 64, 64)


@pytest.fixture(scope="session")
def pixels(icons: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The icons as preprocessed Parquet: of every five groups three train and two test."""
    directory = tmp_path_factory.mktemp("pixels")
    groups = sorted({row["group"] for row in icons})
    split = {group: "train" if i % 5 < 3 else "test" for i, group in enumerate(groups)}
    rows = [{**row, "split": split[row["group"]]} for row in icons]
    pq.write_table(pa.Table.from_pylist(rows), directory / "part-0.parquet")
    return directory


@pytest.fixture(scope="session")
def captions(
    icons: list[dict[str, Any]],
    encoder: HFCaptionEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """What `encode_captions` writes."""
    directory = tmp_path_factory.mktemp("captions")
    texts = sorted({c["text"] for row in icons for c in row["captions"]})
    states, mask = encoder.encode(texts)
    np.save(directory / "states.npy", states[mask].half().numpy())
    np.save(directory / "offsets.npy", np.concatenate([[0], mask.sum(1).cumsum(0).numpy()]))
    (directory / "captions.json").write_text(json.dumps(texts))
    return directory
