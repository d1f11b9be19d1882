"""Where every sample went: outcomes of preprocessing, rules over all rows, and the report.

duplicate_key      a key that came before; the first one stays
held_out_twin      a training picture equal, pixel by pixel, to a held-out one (vendors draw some
                   flags and families alike); kept, it would leak what evaluation judges by
duplicate_picture  with preprocess.deduplicate: pixels that another picture has already
near_duplicate     with preprocess.deduplicate=perceptual: it looks like another picture
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import PreprocessConfig
from pipeline.decoding import ACCEPTED, LEFT_OUT
from pipeline.errors import DataError

DUPLICATE, TWIN = "duplicate_key", "held_out_twin"
EQUAL, ALIKE = "duplicate_picture", "near_duplicate"
HASH_BITS = 64


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
        The rows in that order with their final outcomes.
    """
    places = pa.array([order[shard] for shard in rows["shard"].to_pylist()], pa.int64())
    by_place = [(name, "ascending") for name in ("place", "key", "number")]
    rows = rows.append_column("place", places).sort_by(by_place).drop_columns(["place"])
    keys, splits, digests, outcomes = (
        rows[name].to_pylist() for name in ("key", "split", "digest", "outcome")
    )
    seen: set[str] = set()
    for i, (key, outcome) in enumerate(zip(keys, outcomes, strict=True)):
        if outcome == ACCEPTED:
            outcomes[i] = DUPLICATE if key in seen else ACCEPTED
            seen.add(key)
    held_out = {
        digest
        for digest, split, outcome in zip(digests, splits, outcomes, strict=True)
        if outcome == ACCEPTED and split != "train"
    }
    for i, (digest, split) in enumerate(zip(digests, splits, strict=True)):
        if outcomes[i] == ACCEPTED and split == "train" and digest in held_out:
            outcomes[i] = TWIN
    if config.deduplicate != "no":
        # stable: held-out pictures first, so that what goes is a training picture
        first = sorted(range(len(rows)), key=lambda i: splits[i] == "train")
        chosen = [i for i in first if outcomes[i] == ACCEPTED]
        _drop_equal(chosen, digests, outcomes)
    if config.deduplicate == "perceptual":
        chosen = [i for i in chosen if outcomes[i] == ACCEPTED]
        _drop_alike(chosen, rows["looks"].to_pylist(), outcomes, config.perceptual_distance)
    column = rows.schema.get_field_index("outcome")
    return rows.set_column(column, "outcome", pa.array(outcomes, pa.string()))


def _drop_equal(chosen: Sequence[int], digests: Sequence[bytes], outcomes: list[str]) -> None:
    """Of the chosen rows the first of every digest stays."""
    seen: set[bytes] = set()
    for i in chosen:
        if digests[i] in seen:
            outcomes[i] = EQUAL
        seen.add(digests[i])


def _drop_alike(
    chosen: Sequence[int], looks: Sequence[int], outcomes: list[str], distance: int
) -> None:
    """Of the chosen rows those within `distance` bits of one that stays go.

    Hashes that differ in at most d bits agree in one of d + 1 bands: only those are compared.
    """
    edges = [HASH_BITS * i // (distance + 1) for i in range(distance + 2)]
    bands = [(low, (1 << (high - low)) - 1) for low, high in pairwise(edges)]
    kept: list[dict[int, set[int]]] = [{} for _ in bands]
    for i in chosen:
        look = looks[i]
        places = [(look >> low) & mask for low, mask in bands]
        near = (other for band, place in zip(kept, places, strict=True)
                for other in band.get(place, ()))  # fmt: skip
        if any((look ^ other).bit_count() <= distance for other in near):
            outcomes[i] = ALIKE
            continue
        for band, place in zip(kept, places, strict=True):
            band.setdefault(place, set()).add(look)


def check_counts(rows: pa.Table, promised: Mapping[str, int]) -> None:
    """Every shard that was read gave as many rows as its manifest promises.

    Raises:
        DataError: one did not; the message names it.
    """
    found = Counter(rows["shard"].to_pylist())
    wrong = [f"{s}: {found[s]} of {count}" for s, count in promised.items() if found[s] != count]
    if wrong:
        raise DataError(
            f"samples do not add up, read against promised: {'; '.join(wrong)}; the manifest was "
            "not written with these shards: write the set again"
        )


def check_fraction(reasons: Mapping[str, int], promised: int, limit: float) -> None:
    """Raises DataError if more than `limit` of the promised samples are quarantined.

    `reasons`: quarantined samples by reason, so far.
    """
    bad = sum(reasons.values())
    if bad > limit * promised:
        listed = ", ".join(f"{reason} {n}" for reason, n in Counter(reasons).most_common(5))
        raise DataError(
            f"{bad} of {promised} samples are bad ({listed}), more than "
            f"preprocess.max_bad_fraction={limit}; mend the source, or raise the limit"
        )


def quarantine_table(rows: pa.Table) -> pa.Table:
    """shard, key, reason of every row that is neither accepted nor left out."""
    kept = pc.is_in(rows["outcome"], pa.array([ACCEPTED, LEFT_OUT]))
    bad = rows.filter(pc.invert(kept)).select(["shard", "key", "outcome"])
    return bad.rename_columns(["shard", "key", "reason"])


def by_split_and_style(accepted: pa.Table) -> dict[str, dict[str, int]]:
    """Samples by split, then style."""
    pairs = zip(accepted["split"].to_pylist(), accepted["style"].to_pylist(), strict=True)
    splits: dict[str, dict[str, int]] = {}
    for (split, style), count in sorted(Counter(pairs).items()):
        splits.setdefault(split, {})[style] = count
    return splits


def groups_by_split(accepted: pa.Table) -> dict[str, int]:
    """Groups, not samples, by split."""
    pairs = set(zip(accepted["split"].to_pylist(), accepted["group"].to_pylist(), strict=True))
    return dict(sorted(Counter(split for split, _ in pairs).items()))
