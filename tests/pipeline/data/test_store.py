"""Pixels larger than memory are mapped: the same batches, and memory that stays flat."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.config import ImageFilter
from pipeline.data.preprocess import store
from pipeline.data.preprocess.store import (
    MappedRows,
    flat_file,
    read_pixels,
    read_table,
    read_tokens,
)
from pipeline.errors import DataError
from pipeline.training.datasets import ImageDataset
from pipeline.training.feed import training_batch


def write(directory: Path, rows: int, size: int, files: int = 3) -> np.ndarray:
    """Random images, keys against the order of the files; returns them by key."""
    directory.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(0).integers(0, 256, (rows, 3, size, size), dtype=np.uint8)
    order = np.random.default_rng(1).permutation(rows)
    for part, chosen in enumerate(np.array_split(order, files)):
        table = pa.table(
            {
                "key": [f"{i:06d}" for i in chosen],
                "style": ["odd" if i % 2 else "even" for i in chosen],
                "split": ["test" if i % 5 == 0 else "train" for i in chosen],
                "image": [images[i].tobytes() for i in chosen],
            }
        )
        pq.write_table(table, directory / f"{part:05d}.parquet", row_group_size=64)
    return images


def test_mapped_pixels_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write(tmp_path, 200, 8)

    def read() -> ImageDataset:
        odd = ImageFilter(styles=("odd",))
        return ImageDataset.from_parquet(tmp_path, image_size=8, split="train", image_filter=odd)

    here = read()
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    there = read()
    assert isinstance(there.images, MappedRows) and isinstance(here.images, np.ndarray)
    wanted = images[[i for i in range(200) if i % 2 and i % 5]]
    np.testing.assert_array_equal(here.images, wanted)
    for step in range(9):
        batches = [
            training_batch(data, step, batch_size=16, seed=0, rank=0, world_size=2)["images"]
            for data in (here, there)
        ]
        assert torch.equal(*batches)
    before = flat_file(tmp_path, "image").stat().st_mtime_ns
    read()
    assert flat_file(tmp_path, "image").stat().st_mtime_ns == before, "written once"
    assert pq.read_table(tmp_path).num_rows == 200, "Parquet readers do not see it"


def test_images_of_a_group_share_its_weight(tmp_path: Path) -> None:
    write(tmp_path, 40, 8)
    for path in tmp_path.glob("*.parquet"):
        table = pq.read_table(path)
        groups = [key if int(key) % 2 else "one" for key in table["key"].to_pylist()]
        pq.write_table(table.append_column("group", pa.array(groups)), path)
    image_filter = ImageFilter(group_exponent=0.0)
    data = ImageDataset.from_parquet(
        tmp_path, image_size=8, split="train", image_filter=image_filter
    )
    assert data.weights is not None
    weights = dict(zip((i for i in range(40) if i % 5), data.weights.values, strict=True))
    assert weights[1] == 1 and weights[2] * 16 == pytest.approx(1), "16 even rows train"


def test_several_processes_write_one_file(tmp_path: Path) -> None:
    images = write(tmp_path, 300, 16)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        sums = pool.map(_sum, [tmp_path] * 4)
    assert sums == [int(images.sum())] * 4


def _sum(directory: Path) -> int:
    store.IN_MEMORY_BYTES = 0
    return int(read_pixels(directory, np.arange(300), image_size=16)[np.arange(300)].sum())


def test_another_image_size_is_named(tmp_path: Path) -> None:
    write(tmp_path, 10, 8)
    with pytest.raises(DataError, match=r"rows of 192 bytes, expected 768.*image_size"):
        read_pixels(tmp_path, np.arange(10), image_size=16)


def test_mapped_tokens_are_those_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = np.random.default_rng(0).integers(0, 60_000, (50, 2, 9), dtype=np.uint16)
    pq.write_table(
        pa.table({"image_tokens": [t.tobytes() for t in tokens]}), tmp_path / "t.parquet"
    )
    places = np.random.default_rng(1).permutation(50)[:40]
    here = read_tokens(tmp_path, places, num_tokens=9)
    monkeypatch.setattr(store, "IN_MEMORY_BYTES", 0)
    there = read_tokens(tmp_path, places, num_tokens=9)
    rows, views = np.array([3, 0, 39, 3]), np.array([0, 1, 1, 0])
    assert here.shape == there.shape == (40, 2, 9) and isinstance(there, MappedRows)
    np.testing.assert_array_equal(here[rows, views], tokens[places[rows], views])
    np.testing.assert_array_equal(there[rows, views], tokens[places[rows], views])
    with pytest.raises(DataError, match="rows of 36 bytes, not of 8 tokens"):
        read_tokens(tmp_path, places, num_tokens=8)


def test_filters_name_what_they_left_nothing_of(tmp_path: Path) -> None:
    table = pa.table({"key": ["b", "a"], "split": ["train", "test"], "style": ["x", "y"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert read_table(tmp_path)["key"].to_pylist() == ["a", "b"]
    assert read_table(tmp_path, split="train")["key"].to_pylist() == ["b"]
    assert read_table(tmp_path, image_filter=ImageFilter(exclude_styles=("x",))).num_rows == 1
    with pytest.raises(DataError, match=r"style_weights names z, .* the styles are x, y"):
        read_table(tmp_path, image_filter=ImageFilter(style_weights={"x": 2, "z": 3}))
    captions = pa.array([[], [{"text": "a", "language": "en"}]])
    pq.write_table(table.append_column("captions", captions), tmp_path / "rows.parquet")
    assert read_table(tmp_path, captioned=True)["key"].to_pylist() == ["a"]
    with pytest.raises(DataError, match=r"split='train'.*and a caption"):
        read_table(tmp_path, split="train", captioned=True)
    with pytest.raises(DataError, match=r"none of the 2 pictures.*split='train'"):
        read_table(tmp_path, split="train", image_filter=ImageFilter(styles=("y",)))


PROBE = """
import sys
from pathlib import Path
import pyarrow
from pipeline.data.preprocess import store
from pipeline.training.datasets import ImageDataset
from pipeline.training.feed import training_batch

def anonymous_kb():
    with open("/proc/self/status") as status:
        return int(next(line.split()[1] for line in status if line.startswith("RssAnon")))

def feed(directory):
    data = ImageDataset.from_parquet(Path(directory), image_size=64, split="train")
    for step in range(20):
        training_batch(data, step, batch_size=32, seed=0, rank=0, world_size=1)

store.IN_MEMORY_BYTES = 0
feed(sys.argv[1])  # threads and pools that stay, whatever is read
before = anonymous_kb()
feed(sys.argv[2])
print(anonymous_kb() - before, pyarrow.default_memory_pool().max_memory() >> 10)
"""


def test_the_heap_stays_flat_at_ten_times_the_rows(tmp_path: Path) -> None:
    """What ten times the rows add is no more than a fifth of what they weigh (55 MB)."""
    for rows in (500, 5_000):
        write(tmp_path / str(rows), rows, 64)
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "500"), str(tmp_path / "5000")],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    grown, pool = map(int, result.stdout.split()[-2:])
    limit = 4_500 * 3 * 64 * 64 // 5_000  # kB
    assert grown < limit, f"{grown} kB of heap more at 5,000 rows than at 500"
    assert pool < limit, f"Arrow held {pool} kB at once"
