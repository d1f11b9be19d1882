"""The order of training rows: a permutation an epoch, whatever the number of workers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import ImageFilter
from pipeline.training import feed
from pipeline.training.datasets import CaptionedDataset, CaptionStates, ImageDataset


@given(
    length=st.integers(1, 200), batch_size=st.integers(1, 64), seed=st.integers(0, 9),
    steps=st.integers(1, 20),
)  # fmt: skip
def test_every_epoch_is_a_permutation(length: int, batch_size: int, seed: int, steps: int) -> None:
    rows = np.concatenate(
        [
            feed.global_rows(step, length=length, batch_size=batch_size, seed=seed)
            for step in range(steps)
        ]
    )
    for start in range(0, len(rows) - length + 1, length):
        assert sorted(rows[start : start + length]) == list(range(length))


@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=20),
    exponent=st.floats(0, 1), seed=st.integers(0, 9),
)  # fmt: skip
def test_groups_are_drawn_by_the_power_of_their_size(
    sizes: list[int], exponent: float, seed: int
) -> None:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    weights = feed.RowWeights.from_table(rows_of(groups), ImageFilter(group_exponent=exponent))
    epoch = feed.global_rows(
        0, length=len(groups), batch_size=len(groups), seed=seed, weights=weights
    )
    drawn = np.bincount(epoch, minlength=len(groups))
    powers = np.array(sizes) ** exponent
    expected = (len(groups) * powers / powers.sum() / sizes)[groups]
    assert (abs(drawn - expected) < 1 + 1e-9).all(), "rounded up or down"
    again = feed.global_rows(
        1, length=len(groups), batch_size=len(groups), seed=seed, weights=weights
    )
    assert len(groups) < 8 or again.tolist() != epoch.tolist(), "another epoch, another order"


def test_every_group_is_drawn_equally_often_with_exponent_0() -> None:
    groups = np.array([0] * 90 + [1] * 9 + [2])
    weights = feed.RowWeights.from_table(rows_of(groups), ImageFilter(group_exponent=0.0))
    shares = np.bincount(groups[thirty_epochs(weights)]) / 3_000
    assert shares == pytest.approx([1 / 3] * 3, abs=0.01)
    assert feed.RowWeights.from_table(rows_of(groups), ImageFilter()) is None


def test_styles_are_drawn_by_their_weight() -> None:
    style = np.array(["old"] * 60 + ["new"] * 40)
    table = pa.table({"style": style})
    weights = feed.RowWeights.from_table(table, ImageFilter(style_weights={"new": 3.0}))
    drawn = style[thirty_epochs(weights)]
    assert (drawn == "new").mean() == pytest.approx(120 / 180, abs=0.01)


def thirty_epochs(weights: feed.RowWeights | None) -> np.ndarray:
    """What is drawn of 100 rows."""
    epochs = [
        feed.global_rows(step, length=100, batch_size=100, seed=0, weights=weights)
        for step in range(30)
    ]
    return np.concatenate(epochs)


def rows_of(groups: np.ndarray) -> pa.Table:
    return pa.table({"group": groups})


@given(world_size=st.sampled_from([1, 2, 4]), step=st.integers(0, 50))
def test_ranks_share_a_step_without_overlap(world_size: int, step: int) -> None:
    data = ImageDataset(np.arange(30 * 3 * 4 * 4, dtype=np.uint8).reshape(30, 3, 4, 4))
    together = feed.training_batch(data, step, batch_size=8, seed=1, rank=0, world_size=1)["images"]
    shares = [
        feed.training_batch(data, step, batch_size=8, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    interleaved = torch.stack([share["images"] for share in shares], 1).flatten(0, 1)
    assert torch.equal(interleaved, together)


@given(world_size=st.sampled_from([2, 4]), step=st.integers(0, 20))
def test_captions_views_and_seeds_do_not_depend_on_the_number_of_workers(
    world_size: int, step: int, captioned: CaptionedDataset
) -> None:
    def batches(workers: int) -> list[dict[str, torch.Tensor]]:
        return [
            feed.training_batch(
                captioned, step, batch_size=8, seed=3, rank=rank, world_size=workers
            )
            for rank in range(workers)
        ]

    (whole,) = batches(1)
    shares = batches(world_size)
    assert len(set(whole["seeds"].tolist())) == 8
    for name, value in whole.items():
        assert len({len(share[name]) for share in shares}) == 1, "equal steps on all ranks"
        together = torch.stack([share[name] for share in shares], 1).flatten(0, 1)
        assert torch.equal(together, value), name


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> CaptionedDataset:
    """Ten rows of three views and three captions."""
    folder = tmp_path_factory.mktemp("captions")
    np.save(folder / "states.npy", np.arange(60, dtype=np.float16).reshape(30, 2))
    np.save(folder / "offsets.npy", np.arange(31))
    return CaptionedDataset(
        arrays={"image_tokens": np.arange(10 * 3 * 4, dtype=np.uint16).reshape(10, 3, 4)},
        with_views=frozenset({"image_tokens"}),
        caption_ids=[np.arange(3 * i, 3 * i + 3) for i in range(10)],
        captions=CaptionStates(folder, max_tokens=2),
        style=np.zeros(10, np.int64), group=np.arange(10),
    )  # fmt: skip


def test_a_training_that_resumes_repeats_and_skips_nothing(
    captioned: CaptionedDataset,
) -> None:
    def step(k: int, workers: int) -> list[int]:
        groups = [
            feed.training_batch(captioned, k, batch_size=4, seed=0, rank=r, world_size=workers)
            for r in range(workers)
        ]
        return sorted(int(g) for share in groups for g in share["group"])

    whole = [step(k, 1) for k in range(10)]
    killed_at_7 = [step(k, 1) for k in range(7)] + [step(k, 2) for k in range(7, 10)]
    assert killed_at_7 == whole
    assert sorted(g for batch in whole[:5] for g in batch) == sorted([*range(10)] * 2)


@given(length=st.integers(1, 300), num_batches=st.integers(1, 9), world_size=st.integers(1, 3))
def test_validation_rows_are_fixed_and_split(
    length: int, num_batches: int, world_size: int
) -> None:
    shares = [
        feed.validation_rows(
            length, batch_size=16, num_batches=num_batches, rank=rank, world_size=world_size
        )
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1, "every rank has as many batches"
    sizes = [len(batch) for share in shares for batch in share]
    assert max(sizes) - min(sizes) <= 2
    rows = np.concatenate([batch for share in shares for batch in share])
    assert len(rows) == min(length, 16 * num_batches) == len(set(rows.tolist()))
