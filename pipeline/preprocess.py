"""Shards -> pixels: read, check, decode, square and resize every picture with Ray Data.

What cannot be used goes to a quarantine table with its reason, and every sample the manifests
promise is accounted for or the job fails. A truncated tar only ends early and Ray Data says
nothing: so shards are verified against their SHA-256 before, and rows counted after.

    report = preprocess(
        ["asset:emoji"], Path("pixels"), data=DataConfig(), config=PreprocessConfig()
    )

writes, in one move, replacing what was there; the same shards give the same bytes:

    pixels/*.parquet       key, group, style, split, image (CHW uint8 bytes, 3 * S * S), captions,
                           source, license, attribution, shard; one file a shard, sorted by key
    quarantine/*.parquet   shard, key, reason
    report.json            the PreprocessReport
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import shutil
import tarfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import ray
import ray.data

from pipeline.accounting import (
    PreprocessReport,
    by_split_and_style,
    check_counts,
    check_fraction,
    groups_by_split,
    quarantine_table,
    settle,
)
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.decoding import ACCEPTED, LEFT_OUT, PIXELS, STAGED, Decoder, group_of
from pipeline.errors import DataError, ResourceError, TesseraError
from pipeline.shards import Problem, locate, open_uri, read_manifest, verify
from pipeline.splits import hash_fraction

LOG = logging.getLogger(__name__)
BATCH = 128  # samples a call of the decoder
ROW_GROUP_BYTES = 64_000_000  # of pixels


@dataclass(frozen=True)
class _Plan:
    """The shards to read, and what they promise.

    Attributes:
        labels: SET/FILE by the path Ray Data reports, in reading order.
        promised: samples by label, of the shards that are read.
        lost: samples in damaged shards.
        problems: the damaged shards.
        digests: of the sets.
    """

    filesystem: pa.fs.FileSystem
    labels: dict[str, str]
    promised: dict[str, int]
    lost: int
    problems: tuple[Problem, ...]
    digests: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.lost + sum(self.promised.values())


def preprocess(
    shard_sets: Sequence[str],
    output: Path,
    *,
    data: DataConfig,
    config: PreprocessConfig,
) -> PreprocessReport:
    """Shard sets -> pixels, quarantine and report under `output`. Ray must be running.

    Args:
        shard_sets: folders, URIs or asset:NAME, all on one file system.
        output: folder, on a disk that every Ray node sees.
        data: split, limit, and whether damaged shards are tolerated (`data.shards` is not read).
        config: the picture's size and what is quarantined.

    Raises:
        DataError: a damaged shard, too many bad samples, none left, or samples unaccounted for.
        ResourceError: the disk is full.
    """
    plan = _plan(shard_sets, data)
    output = output.resolve()
    staging = output.with_name(f".{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        report = _run(plan, staging, data, config)
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
        (staging / "report.json").write_text(text + "\n", encoding="utf-8")
        _swap(staging, output)
    except (ray.exceptions.RayError, OSError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        raise explained from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _explained(error: Exception) -> TesseraError | None:
    """A full disk or a malformed tar, here or in a worker; None for what no user can mend."""
    cause = getattr(error, "cause", error)
    if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
        return ResourceError("no space is left on the output's disk; free some, or move --home")
    # webdataset's reader: members of one sample apart, the same member twice, no tar at all
    if isinstance(error, ray.exceptions.RayError) and isinstance(
        cause, ValueError | tarfile.TarError
    ):
        return DataError(f"a shard is no valid WebDataset tar: {cause}; write the set again")
    return None


def _plan(shard_sets: Sequence[str], data: DataConfig) -> _Plan:
    """Read the manifests and verify every shard."""
    if not shard_sets:
        raise DataError("no shard set given; data.shards names them")
    labels: dict[str, str] = {}
    promised: dict[str, int] = {}
    problems: list[Problem] = []
    digests, systems, lost = [], [], 0
    if len(set(shard_sets)) < len(shard_sets):
        raise DataError(f"a shard set is named twice: {', '.join(shard_sets)}")
    for number, uri in enumerate(map(locate, shard_sets)):
        fs, root = open_uri(uri)
        systems.append(fs)
        manifest, name = read_manifest(uri), root.rpartition("/")[2]
        damaged = {p.file: p for p in verify(uri) if p.kind != "surplus"}
        digests.append(manifest.digest)
        for shard in manifest.shards:
            if shard.file in damaged:
                problems.append(damaged[shard.file])
                lost += shard.samples
            else:
                label = f"{name}/{shard.file}"
                if label in promised:  # two sets of one name
                    label = f"{name}-{number}/{shard.file}"
                labels[f"{root}/{shard.file}"] = label
                promised[label] = shard.samples
    if any(fs != systems[0] for fs in systems):
        raise DataError(f"shard sets on several file systems at once: {', '.join(shard_sets)}")
    plan = _Plan(systems[0], labels, promised, lost, tuple(problems), tuple(digests))
    _check_problems(plan, data)
    return plan


def _check_problems(plan: _Plan, data: DataConfig) -> None:
    if not plan.problems:
        return
    listed = f"{plan.lost} of {plan.total} samples are lost: {'; '.join(map(str, plan.problems))}"
    if not data.allow_missing_shards:
        raise DataError(
            f"{listed}. Write the shards again, or set data.allow_missing_shards=true to go on "
            "without them"
        )
    if not plan.labels:
        raise DataError(f"{listed}. No shard is left to read: write them again")
    LOG.warning("going on although %s", listed)


def _run(
    plan: _Plan, staging: Path, data: DataConfig, config: PreprocessConfig
) -> PreprocessReport:
    """Decode with Ray Data, settle the outcomes, write the final tables."""
    started = time.monotonic()
    stats = _decode(plan, staging / "staged", data, config)
    columns = ["key", "shard", "group", "style", "split", "digest", "outcome"]
    staged = pads.dataset(staging / "staged", schema=STAGED).to_table(columns)
    check_counts(staged, plan.promised)
    order = {label: place for place, label in enumerate(plan.promised)}
    rows = settle(staged, order)
    quarantine = quarantine_table(rows)
    check_fraction(quarantine, plan.total, config.max_bad_fraction)
    accepted = rows.filter(pc.equal(rows["outcome"], ACCEPTED))
    if not len(accepted):
        raise DataError(f"none of {plan.total} samples can be used")
    _write_tables(staging, accepted, quarantine, order, config)
    seconds = time.monotonic() - started
    return PreprocessReport(
        promised=plan.total,
        accepted=len(accepted),
        quarantined=len(quarantine),
        left_out=Counter(rows["outcome"].to_pylist())[LEFT_OUT],
        missing=plan.lost,
        reasons=dict(Counter(quarantine["reason"].to_pylist()).most_common()),
        splits=by_split_and_style(accepted),
        split_groups=groups_by_split(accepted),
        digests=plan.digests,
        damaged_shards=tuple(map(str, plan.problems)),
        seconds=round(seconds, 2),
        images_per_s=round(len(rows) / seconds, 1),
        stats=stats,
    )


def _decode(plan: _Plan, target: Path, data: DataConfig, config: PreprocessConfig) -> str:
    """The Ray Data pipeline: read, decode, write STAGED rows. Returns its statistics."""
    groups = None if data.limit is None else _first_groups(plan, data.limit, data.split_seed)
    decoder = Decoder(plan.labels, groups, data, config)
    dataset = _read(plan).map_batches(decoder, batch_size=BATCH, batch_format="pandas")
    dataset.write_parquet(str(target), compression="lz4")
    return str(dataset.stats())


def _read(plan: _Plan, suffixes: list[str] | None = None) -> ray.data.Dataset:
    """Encoded samples, a read task a shard."""
    return ray.data.read_webdataset(
        list(plan.labels),
        filesystem=plan.filesystem,
        decoder=None,
        suffixes=suffixes,
        override_num_blocks=len(plan.labels),
    )


def _first_groups(plan: _Plan, limit: int, seed: int) -> frozenset[str]:
    """The first `limit` groups by hash: a random choice that more data hardly changes."""

    def groups(batch: Any) -> pa.Table:
        found = {group for group in map(group_of, batch.get("json", ())) if group is not None}
        return pa.table({"group": pa.array(sorted(found), pa.string())})

    rows = _read(plan, ["json"]).map_batches(groups, batch_format="pandas").take_all()
    found = {row["group"] for row in rows}
    return frozenset(sorted(found, key=lambda g: (hash_fraction("limit", g, seed), g))[:limit])


def _write_tables(
    staging: Path,
    accepted: pa.Table,
    quarantine: pa.Table,
    order: Mapping[str, int],
    config: PreprocessConfig,
) -> None:
    """Final tables from the staged rows, a Ray task a shard, then drop the staged ones."""
    for name in ("pixels", "quarantine"):
        (staging / name).mkdir()
    pq.write_table(quarantine, staging / "quarantine" / "00000.parquet")
    group_rows = max(1, ROW_GROUP_BYTES // (3 * config.image_size**2))
    write = ray.remote(_write_pixels)
    tasks = []
    for label, place in order.items():
        keys = accepted.filter(pc.equal(accepted["shard"], label))["key"].combine_chunks()
        if len(keys):
            target = staging / "pixels" / f"{place:05d}.parquet"
            tasks.append(write.remote(staging / "staged", label, keys, target, group_rows))
    ray.get(tasks)
    shutil.rmtree(staging / "staged")


def _write_pixels(staged: Path, label: str, keys: pa.Array, target: Path, group_rows: int) -> None:
    """The accepted rows of one shard, sorted by key."""
    wanted = (pc.field("shard") == label) & pc.field("key").isin(keys)
    table = pads.dataset(staged, schema=STAGED).to_table(PIXELS.names, filter=wanted)
    table = table.sort_by("key").combine_chunks()
    repeated = [name for name in PIXELS.names if name not in ("key", "image")]
    pq.write_table(
        table,
        target,
        row_group_size=group_rows,
        compression="zstd",
        use_dictionary=repeated,
    )


def _swap(staging: Path, output: Path) -> None:
    """Put the finished folder in the place of the old one."""
    old = output.with_name(f".{output.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    staging.rename(output)
    shutil.rmtree(old, ignore_errors=True)
