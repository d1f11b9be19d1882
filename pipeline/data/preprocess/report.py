"""The account of a preprocessing run: every sample's final outcome, checks on them, and the report.

Decoding gives each sample an outcome that depends on the sample alone
(pipeline/data/preprocess/rows.py). The rules here compare accepted samples with each other, and add
the reasons

duplicate_key      an earlier sample has the same key
held_out_twin      a training image equals a validation or test image pixel by pixel (vendors draw
                   some flags and families alike); kept, it would leak what evaluation tests with
duplicate_picture  with preprocess.deduplicate: an earlier image has the same pixels
near_duplicate     with preprocess.deduplicate=perceptual: an earlier image looks almost the same

    rows = resolve_outcomes(staged, {"set/00000.tar": 0}, config)
    quarantine_table(rows)           # shard, key and reason of what is not used
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
from pipeline.data.preprocess.rows import ACCEPTED, LEFT_OUT
from pipeline.errors import DataError

DUPLICATE_KEY, HELD_OUT_TWIN = "duplicate_key", "held_out_twin"
DUPLICATE_PICTURE, NEAR_DUPLICATE = "duplicate_picture", "near_duplicate"
HASH_BITS = 64
NOT_BAD = frozenset({"other_language", HELD_OUT_TWIN, DUPLICATE_PICTURE, NEAR_DUPLICATE})
"""Reasons that follow from what the recipe asks for; the others mean that the data is bad."""
QUARANTINE = pa.schema([(name, pa.string()) for name in ("shard", "key", "reason")])


@dataclass(frozen=True)
class PreprocessReport:
    """What became of every sample: promised = accepted + quarantined + left_out + missing.

    Attributes:
        promised: samples that the manifests count.
        accepted: samples whose pixels were written.
        quarantined: samples that cannot be used; each has a row in the quarantine table.
        left_out: samples of groups beyond data.limit.
        missing: samples in damaged shards, with data.allow_missing_shards.
        reasons: quarantined samples by reason.
        captions_left_out: captions by reason that accepted samples lost, having others.
        splits: accepted samples by split, then style.
        split_groups: groups by split.
        digests: the shard sets' dataset digests, in their order.
        damaged_shards: one sentence per shard that was not read.
        seconds: for reading, decoding and writing.
        images_per_s: samples read per second.
        stats: Ray Data's account of the time by operator.
    """

    promised: int
    accepted: int
    quarantined: int
    left_out: int
    missing: int
    reasons: dict[str, int]
    captions_left_out: dict[str, int]
    splits: dict[str, dict[str, int]]
    split_groups: dict[str, int]
    digests: tuple[str, ...]
    damaged_shards: tuple[str, ...]
    seconds: float
    images_per_s: float
    stats: str


def resolve_outcomes(
    rows: pa.Table, shard_index: Mapping[str, int], config: PreprocessConfig
) -> pa.Table:
    """Give rows their final outcomes: the rules above, in their order, over all accepted rows.

    Args:
        rows: key, shard, index, split, digest, perceptual_hash and outcome of every sample.
        shard_index: each shard's place in the reading order, by its label.
        config: which duplicates are removed.

    Returns:
        The rows by shard, then key, with their final outcomes and the column "shard_index".
    """
    rows = rows.append_column("shard_index", pa.array(_shard_indices(rows["shard"], shard_index)))
    rows = rows.sort_by([(name, "ascending") for name in ("shard_index", "key", "index")])
    removed: dict[str, NDArray[np.int64]] = {}  # row numbers by reason
    left = np.flatnonzero(pc.equal(rows["outcome"], ACCEPTED).to_numpy())
    is_train = pc.equal(rows["split"], "train").fill_null(False).to_numpy()

    def remove(reason: str, mask: NDArray[np.bool_]) -> None:
        nonlocal left
        removed[reason], left = left[mask], left[~mask]

    remove(DUPLICATE_KEY, ~_is_first(rows["key"].take(left)))
    held_out = rows["digest"].take(left[~is_train[left]]).unique()
    is_twin = pc.is_in(rows["digest"].take(left), held_out).to_numpy()
    remove(HELD_OUT_TWIN, is_twin & is_train[left])
    # held-out images first: of two duplicates the training image is removed
    left = np.concatenate([left[~is_train[left]], left[is_train[left]]])
    if config.deduplicate != "no":
        remove(DUPLICATE_PICTURE, ~_is_first(rows["digest"].take(left)))
    if config.deduplicate == "perceptual":
        hashes = rows["perceptual_hash"].take(left).to_numpy()
        remove(NEAR_DUPLICATE, _is_near_duplicate(hashes, config.perceptual_distance))
    outcome = rows["outcome"]
    for reason, numbers in removed.items():
        mask = np.zeros(len(rows), bool)
        mask[numbers] = True
        outcome = pc.if_else(pa.array(mask), reason, outcome)
    return rows.set_column(rows.schema.get_field_index("outcome"), "outcome", outcome)


def _shard_indices(labels: pa.ChunkedArray, shard_index: Mapping[str, int]) -> NDArray[np.int32]:
    """int32 (rows,): by row, its shard's index; the labels may be dictionary-encoded."""
    if not pa.types.is_dictionary(labels.type):
        labels = labels.dictionary_encode()
    found = [np.empty(0, np.int32)]
    for chunk in labels.chunks:
        by_code = np.array([shard_index[s] for s in chunk.dictionary.to_pylist()], np.int32)
        found.append(by_code[chunk.indices.to_numpy()])
    return np.concatenate(found)


def _is_first(column: pa.ChunkedArray) -> NDArray[np.bool_]:
    """bool (rows,): no row before has the same value.

    Arrow's dictionary codes are given in the order in which values appear.
    """
    codes = [chunk.indices.to_numpy() for chunk in column.dictionary_encode().chunks]
    highest = np.maximum.accumulate(np.concatenate([np.empty(0, np.int32), *codes]))
    is_first: NDArray[np.bool_] = np.diff(highest, prepend=-1) > 0
    return is_first


def _is_near_duplicate(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.bool_]:
    """bool (rows,): at most `distance` bits differ from an earlier row that is no near duplicate.

    Two hashes that differ in at most d bits agree in one of d + 1 bands of bits, so that only
    hashes which share a band are compared.
    """
    edges = [HASH_BITS * i // (distance + 1) for i in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    kept: list[dict[int, set[int]]] = [{} for _ in bands]  # per band, hashes by its bits
    is_near = np.zeros(len(hashes), bool)
    for i, value in enumerate(map(int, hashes)):
        bits = [(value >> low) & mask for low, mask in bands]
        candidates = (other for band, here in zip(kept, bits, strict=True)
                      for other in band.get(here, ()))  # fmt: skip
        if any((value ^ other).bit_count() <= distance for other in candidates):
            is_near[i] = True
            continue
        for band, here in zip(kept, bits, strict=True):
            band.setdefault(here, set()).add(value)
    return is_near


def check_counts(rows: pa.Table, promised: Mapping[str, int]) -> None:
    """Check that every shard gave as many rows as its manifest promises.

    Args:
        rows: of every sample that was read, with its shard's label.
        promised: samples by label.

    Raises:
        DataError: a shard gave another number; the message names it.
    """
    counted = rows["shard"].value_counts().to_pylist()
    found = Counter({row["values"]: row["counts"] for row in counted})
    wrong = [f"{s}: {found[s]} of {count}" for s, count in promised.items() if found[s] != count]
    if wrong:
        raise DataError(
            f"samples do not add up, read against promised: {'; '.join(wrong)}; the manifest was "
            "not written with these shards: write the set again"
        )


def bad_among(reasons: Mapping[str, int]) -> Counter[str]:
    """Those of the quarantined samples, by reason, that mean bad data."""
    return Counter({reason: n for reason, n in reasons.items() if reason not in NOT_BAD})


def check_bad_fraction(reasons: Mapping[str, int], promised: int, limit: float) -> None:
    """Check that no more than `limit` of the promised samples are bad.

    Args:
        reasons: quarantined samples by reason, so far; those of NOT_BAD do not count.
        promised: samples that the manifests count.
        limit: preprocess.max_bad_fraction.

    Raises:
        DataError: more are bad; the message lists the most frequent reasons.
    """
    bad_reasons = bad_among(reasons)
    bad = bad_reasons.total()
    if bad > limit * promised:
        listed = ", ".join(f"{reason} {n}" for reason, n in bad_reasons.most_common(5))
        remedy = "mend the source, or raise the limit"
        if DUPLICATE_KEY in reasons:
            remedy = f"keys must be unique over all sets of data.shards; {remedy}"
        raise DataError(
            f"{bad} of {promised} samples are bad ({listed}), more than "
            f"preprocess.max_bad_fraction={limit}; {remedy}"
        )


def quarantine_table(rows: pa.Table) -> pa.Table:
    """shard, key, reason of every row that is neither accepted nor left out."""
    is_quarantined = pc.invert(pc.is_in(rows["outcome"], pa.array([ACCEPTED, LEFT_OUT])))
    quarantined = rows.filter(is_quarantined).select(["shard", "key", "outcome"])
    return quarantined.rename_columns(["shard", "key", "reason"]).cast(QUARANTINE)


def count_by_split_and_style(accepted: pa.Table) -> dict[str, dict[str, int]]:
    """How many samples there are, by split, then style."""
    counted = accepted.group_by(["split", "style"]).aggregate([([], "count_all")])
    splits: dict[str, dict[str, int]] = {}
    for row in counted.sort_by([("split", "ascending"), ("style", "ascending")]).to_pylist():
        splits.setdefault(row["split"], {})[row["style"]] = row["count_all"]
    return splits


def count_groups_by_split(accepted: pa.Table) -> dict[str, int]:
    """How many groups (not samples) there are, by split."""
    counted = accepted.group_by("split").aggregate([("group", "count_distinct")])
    rows = counted.sort_by("split").to_pylist()
    return {row["split"]: row["group_count_distinct"] for row in rows}
