"""Where every sample went: outcomes of preprocessing, rules over all rows, and the report.

duplicate_key      a key that came before; the first one stays
held_out_twin      a training picture equal, pixel by pixel, to a held-out one (vendors draw some
                   flags and families alike); kept, it would leak what evaluation judges by
duplicate_picture  with preprocess.deduplicate: pixels that another picture has already
near_duplicate     with preprocess.deduplicate=perceptual: it looks like another picture
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.config import PreprocessConfig
from pipeline.decoding import ACCEPTED, LEFT_OUT
from pipeline.errors import DataError

DUPLICATE, TWIN = "duplicate_key", "held_out_twin"
EQUAL, ALIKE = "duplicate_picture", "near_duplicate"
HASH_BITS = 64
CHOSEN = frozenset({"other_language", TWIN, EQUAL, ALIKE})
"""Reasons that the recipe asks for; the others say that something is wrong with the data."""
QUARANTINE = pa.schema([(name, pa.string()) for name in ("shard", "key", "reason")])


@dataclass(frozen=True)
class PreprocessReport:
    """promised = accepted + quarantined + left_out + missing.

    Attributes:
        left_out: samples of groups beyond data.limit.
        missing: samples in damaged shards, with data.allow_missing_shards.
        reasons: quarantined samples by reason.
        splits: accepted samples by split, then style.
        split_groups: groups by split.
        digests: the shard sets' dataset digests, in their order.
        damaged_shards: a sentence a shard that was not read.
        seconds: of reading, decoding and writing.
        images_per_s: samples read a second.
        stats: Ray Data's account of the time by operator.
    """

    promised: int
    accepted: int
    quarantined: int
    left_out: int
    missing: int
    reasons: dict[str, int]
    splits: dict[str, dict[str, int]]
    split_groups: dict[str, int]
    digests: tuple[str, ...]
    damaged_shards: tuple[str, ...]
    seconds: float
    images_per_s: float
    stats: str


def settle(rows: pa.Table, order: Mapping[str, int], config: PreprocessConfig) -> pa.Table:
    """Apply the rules to the outcomes.

    Args:
        rows: key, shard, number, split, digest, looks, outcome of every sample.
        order: a shard's place; rows are taken shard by shard, by key.
        config: which duplicates go.

    Returns:
        The rows in that order with their final outcomes, and the column "place" of their shard.
    """
    rows = rows.append_column("place", pa.array(_places(rows["shard"], order)))
    rows = rows.sort_by([(name, "ascending") for name in ("place", "key", "number")])
    verdicts: dict[str, NDArray[np.int64]] = {}  # by reason, the rows that go
    left = np.flatnonzero(pc.equal(rows["outcome"], ACCEPTED).to_numpy())
    is_train = pc.equal(rows["split"], "train").fill_null(False).to_numpy()

    def drop(reason: str, goes: NDArray[np.bool_]) -> None:
        nonlocal left
        verdicts[reason], left = left[goes], left[~goes]

    drop(DUPLICATE, ~_is_first(rows["key"].take(left)))
    held_out = rows["digest"].take(left[~is_train[left]]).unique()
    twins = pc.is_in(rows["digest"].take(left), held_out).to_numpy()
    drop(TWIN, twins & is_train[left])
    # held-out pictures first, so that what goes is a training picture
    left = np.concatenate([left[~is_train[left]], left[is_train[left]]])
    if config.deduplicate != "no":
        drop(EQUAL, ~_is_first(rows["digest"].take(left)))
    if config.deduplicate == "perceptual":
        looks = rows["looks"].take(left).to_numpy()
        drop(ALIKE, _is_alike(looks, config.perceptual_distance))
    outcome = rows["outcome"]
    for reason, those in verdicts.items():
        mask = np.zeros(len(rows), bool)
        mask[those] = True
        outcome = pc.if_else(pa.array(mask), reason, outcome)
    return rows.set_column(rows.schema.get_field_index("outcome"), "outcome", outcome)


def _places(shards: pa.ChunkedArray, order: Mapping[str, int]) -> NDArray[np.int32]:
    """The places of a column of labels, which may be dictionary-encoded."""
    if not pa.types.is_dictionary(shards.type):
        shards = shards.dictionary_encode()
    found = [np.empty(0, np.int32)]
    for chunk in shards.chunks:
        known = np.array([order[label] for label in chunk.dictionary.to_pylist()], np.int32)
        found.append(known[chunk.indices.to_numpy()])
    return np.concatenate(found)


def _is_first(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """bool (rows,): no row before has the same value. Codes are given in order of appearance."""
    codes = [chunk.indices.to_numpy() for chunk in column.dictionary_encode().chunks]
    highest = np.maximum.accumulate(np.concatenate([np.empty(0, np.int32), *codes]))
    first: NDArray[np.bool_] = np.diff(highest, prepend=-1) > 0
    return first


def _is_alike(looks: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    """bool (rows,): within `distance` bits of an earlier row that is not itself alike.

    Hashes that differ in at most d bits agree in one of d + 1 bands: only those are compared.
    """
    edges = [HASH_BITS * i // (distance + 1) for i in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    kept: list[dict[int, set[int]]] = [{} for _ in bands]
    alike = np.zeros(len(looks), bool)
    for i, look in enumerate(map(int, looks)):
        places = [(look >> low) & mask for low, mask in bands]
        near = (other for band, place in zip(kept, places, strict=True)
                for other in band.get(place, ()))  # fmt: skip
        if any((look ^ other).bit_count() <= distance for other in near):
            alike[i] = True
            continue
        for band, place in zip(kept, places, strict=True):
            band.setdefault(place, set()).add(look)
    return alike


def check_counts(rows: pa.Table, promised: Mapping[str, int]) -> None:
    """Every shard that was read gave as many rows as its manifest promises.

    Raises:
        DataError: one did not; the message names it.
    """
    counted = rows["shard"].value_counts().to_pylist()
    found = Counter({row["values"]: row["counts"] for row in counted})
    wrong = [f"{s}: {found[s]} of {count}" for s, count in promised.items() if found[s] != count]
    if wrong:
        raise DataError(
            f"samples do not add up, read against promised: {'; '.join(wrong)}; the manifest was "
            "not written with these shards: write the set again"
        )


def check_fraction(reasons: Mapping[str, int], promised: int, limit: float) -> None:
    """Raises DataError if more than `limit` of the promised samples are bad.

    `reasons`: quarantined samples by reason, so far; those of CHOSEN are not bad.
    """
    wrong = Counter({reason: n for reason, n in reasons.items() if reason not in CHOSEN})
    bad = wrong.total()
    if bad > limit * promised:
        listed = ", ".join(f"{reason} {n}" for reason, n in wrong.most_common(5))
        remedy = "mend the source, or raise the limit"
        if DUPLICATE in reasons:
            remedy = f"keys must be unique over all sets of data.shards; {remedy}"
        raise DataError(
            f"{bad} of {promised} samples are bad ({listed}), more than "
            f"preprocess.max_bad_fraction={limit}; {remedy}"
        )


def quarantine_table(rows: pa.Table) -> pa.Table:
    """shard, key, reason of every row that is neither accepted nor left out."""
    kept = pc.is_in(rows["outcome"], pa.array([ACCEPTED, LEFT_OUT]))
    bad = rows.filter(pc.invert(kept)).select(["shard", "key", "outcome"])
    return bad.rename_columns(["shard", "key", "reason"]).cast(QUARANTINE)


def by_split_and_style(accepted: pa.Table) -> dict[str, dict[str, int]]:
    """Samples by split, then style."""
    counted = accepted.group_by(["split", "style"]).aggregate([([], "count_all")])
    splits: dict[str, dict[str, int]] = {}
    for row in counted.sort_by([("split", "ascending"), ("style", "ascending")]).to_pylist():
        splits.setdefault(row["split"], {})[row["style"]] = row["count_all"]
    return splits


def groups_by_split(accepted: pa.Table) -> dict[str, int]:
    """Groups, not samples, by split."""
    counted = accepted.group_by("split").aggregate([("group", "count_distinct")])
    rows = counted.sort_by("split").to_pylist()
    return {row["split"]: row["group_count_distinct"] for row in rows}
