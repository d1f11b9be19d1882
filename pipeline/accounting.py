"""Where every sample went: outcomes of preprocessing, two rules over all rows, and the report.

duplicate_key    a key that an earlier shard holds already; the first one stays
held_out_twin    a training picture equal, pixel by pixel, to a held-out one (vendors draw some
                 flags and families alike); kept, it would leak what evaluation judges by
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.decoding import ACCEPTED, LEFT_OUT
from pipeline.errors import DataError

DUPLICATE, TWIN = "duplicate_key", "held_out_twin"


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


def settle(rows: pa.Table, order: Mapping[str, int]) -> pa.Table:
    """Apply both rules to the outcomes.

    Args:
        rows: key, shard, split, digest, outcome of every sample.
        order: a shard's place; rows are taken shard by shard, by key.

    Returns:
        The rows in that order with their final outcomes.
    """
    places = pa.array([order[shard] for shard in rows["shard"].to_pylist()], pa.int64())
    by_place = [("place", "ascending"), ("key", "ascending")]
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
    column = rows.schema.get_field_index("outcome")
    return rows.set_column(column, "outcome", pa.array(outcomes, pa.string()))


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


def check_fraction(quarantined: pa.Table, promised: int, limit: float) -> None:
    """Raises DataError if more than `limit` of the promised samples are quarantined."""
    if len(quarantined) > limit * promised:
        reasons = Counter(quarantined["reason"].to_pylist()).most_common(5)
        listed = ", ".join(f"{reason} {count}" for reason, count in reasons)
        raise DataError(
            f"{len(quarantined)} of {promised} samples are bad ({listed}), more than "
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
