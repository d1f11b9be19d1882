"""How shards are cut into parts for reading tasks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.preprocess.reader import PART_SAMPLES, ShardFile, parts_of


def shards(*samples: int) -> list[ShardFile]:
    return [ShardFile(f"set/{i}", f"{i}.tar", count) for i, count in enumerate(samples)]


@given(st.lists(st.integers(0, 20_000), max_size=8), st.integers(1, 64))
def test_parts_are_the_shards_whatever_the_tasks(samples: list[int], tasks: int) -> None:
    parts = list(parts_of(shards(*samples), tasks))
    for shard in shards(*samples):
        here = [(p["start"], p["end"]) for p in parts if p["label"] == shard.label]
        assert [0, *(end for _, end in here)] == [*(start for start, _ in here), shard.samples]
        if len(here) > 1:
            assert min(end - start for start, end in here) >= PART_SAMPLES // 2


def test_parts_begin_big_and_end_small() -> None:
    sizes = [part["end"] - part["start"] for part in parts_of(shards(40_000), 2)]
    assert sizes[0] == 10_000 and sizes[-1] < 2 * PART_SAMPLES
    assert sizes[:-1] == sorted(sizes[:-1], reverse=True)
    assert len(list(parts_of(shards(*[1_000] * 500), 4))) < 550, "many shards stay whole"
