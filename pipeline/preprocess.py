"""Shards -> pixels: read, check, decode, square and resize every picture with Ray Data.

What cannot be used goes to a quarantine table with its reason, and every sample the manifests
promise is accounted for or the job fails. A truncated tar only ends early and Ray Data says
nothing: so shards are verified against their SHA-256 before, and rows counted after.

    report = preprocess(
        ["asset:emoji"], Path("pixels"), data=DataConfig(), config=PreprocessConfig()
    )

Killed at any moment and run again, it goes on: what was decoded lies beside the output, shard by
shard, until the job is done. It writes, in one move, replacing what was there; the same shards give
the same bytes, however often it was killed:

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
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs
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
from pipeline.artifacts import publishing, replace_directory
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.decoding import (
    ACCEPTED,
    LEFT_OUT,
    PIXELS,
    STAGED,
    Decoder,
    group_of,
    load_imagehash,
)
from pipeline.errors import DataError, ResourceError, TesseraError
from pipeline.progress import OnProgress, Progress
from pipeline.reading import Samples, ShardFile, map_samples
from pipeline.runtime import return_memory, task_slots
from pipeline.shards import (
    Problem,
    check_one_file_system,
    locate,
    open_shards,
    read_manifest,
    verify,
)
from pipeline.splits import hash_fraction

LOG = logging.getLogger(__name__)
ROW_GROUP_BYTES = 64_000_000  # of pixels, in the final tables and decoded at once
SETTLED = ("key", "shard", "number", "group", "style", "split", "digest", "looks", "outcome")
RESUMABLE, FINAL = "plan.json", "final"  # within the folder beside the output
STAGING_FORMAT = 1  # of what lies there while the job runs


@dataclass(frozen=True)
class _Plan:
    """The shards to read, and what they promise.

    Attributes:
        shards: in reading order.
        lost: samples in damaged shards.
        problems: the damaged shards.
        digests: of the sets.
    """

    filesystem: pyarrow.fs.FileSystem
    shards: tuple[ShardFile, ...]
    lost: int
    problems: tuple[Problem, ...]
    digests: tuple[str, ...]

    @property
    def total(self) -> int:
        return self.lost + sum(shard.samples for shard in self.shards)

    @property
    def order(self) -> dict[str, int]:
        """A shard's place by its label."""
        return {shard.label: place for place, shard in enumerate(self.shards)}


def preprocess(
    shard_sets: Sequence[str],
    output: Path,
    *,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None = None,
) -> PreprocessReport:
    """Shard sets -> pixels, quarantine and report under `output`. Ray must be running.

    Args:
        shard_sets: folders, URIs or asset:NAME, all on one file system.
        output: folder, on a disk that every Ray node sees.
        data: split, limit, and whether damaged shards are tolerated (`data.shards` is not read).
        config: the picture's size and what is quarantined.
        on_progress: told after every block.

    Raises:
        DataError: a damaged shard, too many bad samples, none left, or samples unaccounted for.
        ResourceError: the disk is full, or a library that config asks for is missing.
    """
    if config.deduplicate == "perceptual":
        load_imagehash()
    plan = _plan(shard_sets, data)
    output = output.resolve()
    staging = output.with_name(f".{output.name}.partial")
    _prepare(staging, plan, data, config)
    try:
        report = _run(plan, staging, data, config, on_progress)
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
        (staging / FINAL / "report.json").write_text(text + "\n", encoding="utf-8")
        replace_directory(staging / FINAL, output)
        shutil.rmtree(staging)
    except (ray.exceptions.RayError, OSError) as error:
        explained = _explained(error)
        if explained is None:
            raise
        raise explained from error
    return report


def _prepare(staging: Path, plan: _Plan, data: DataConfig, config: PreprocessConfig) -> None:
    """Keep what an interrupted run of the same job left in staging, and nothing else.

    The limit of bad samples is no part of the job: raised, it does not redo anything.
    """
    job = {
        "format": STAGING_FORMAT,
        "shards": [[shard.label, shard.samples] for shard in plan.shards],
        "digests": plan.digests,
        "data": data.model_dump(mode="json", exclude={"shards"}),
        "config": config.model_dump(mode="json", exclude={"max_bad_fraction"}),
    }
    text = json.dumps(job)
    record = staging / RESUMABLE
    if record.is_file() and record.read_text(encoding="utf-8") == text:
        LOG.info("going on with what an interrupted run left in %s", staging)
        return
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "staged").mkdir(parents=True)
    with publishing(record) as new:
        new.write_text(text, encoding="utf-8")


def _explained(error: BaseException) -> TesseraError | None:
    """A mistake of ours or a full disk, here or in a worker; None for what no user can mend."""
    cause: BaseException | None = getattr(error, "cause", error)
    while cause is not None:
        if isinstance(cause, TesseraError):
            return cause
        if isinstance(cause, OSError) and cause.errno == errno.ENOSPC:
            return ResourceError("no space is left on the output's disk; free some, or move --home")
        cause = cause.__cause__
    return None


def _plan(shard_sets: Sequence[str], data: DataConfig) -> _Plan:
    """Read the manifests and verify every shard."""
    if not shard_sets:
        raise DataError("no shard set given; data.shards names them")
    if len(set(shard_sets)) < len(shard_sets):
        raise DataError(f"a shard set is named twice: {', '.join(shard_sets)}")
    shards: dict[str, ShardFile] = {}
    problems: list[Problem] = []
    digests, systems, lost = [], [], 0
    for number, uri in enumerate(map(locate, shard_sets)):
        manifest = read_manifest(uri)
        fs, root = open_shards(uri, manifest)
        name = root.rpartition("/")[2]
        systems.append(fs)
        damaged = {p.file: p for p in verify(uri) if p.kind != "surplus"}
        digests.append(manifest.digest)
        for shard in manifest.shards:
            if shard.file in damaged:
                problems.append(damaged[shard.file])
                lost += shard.samples
            else:
                label = f"{name}/{shard.file}"
                while label in shards:  # two sets of one name
                    label = f"{number}-{label}"
                path = f"{root}/{shard.file}"
                shards[label] = ShardFile(label, path, shard.samples, manifest.in_place)
    check_one_file_system(systems, shard_sets)
    plan = _Plan(systems[0], tuple(shards.values()), lost, tuple(problems), tuple(digests))
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
    if not plan.shards:
        raise DataError(f"{listed}. No shard is left to read: write them again")
    LOG.warning("going on although %s", listed)


def _run(
    plan: _Plan,
    staging: Path,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None,
) -> PreprocessReport:
    """Decode with Ray Data, settle the outcomes, write the final tables."""
    started = time.monotonic()
    decoded, stats = _decode(plan, staging / "staged", data, config, on_progress)
    staged = _staged_outcomes(staging / "staged")
    check_counts(staged, {shard.label: shard.samples for shard in plan.shards})
    order = plan.order
    rows = settle(staged, order, config)
    quarantine = quarantine_table(rows)
    reasons = dict(Counter(quarantine["reason"].to_pylist()).most_common())
    check_fraction(reasons, plan.total, config.max_bad_fraction)
    accepted = rows.filter(pc.equal(rows["outcome"], ACCEPTED))
    if not len(accepted):
        raise DataError(f"none of {plan.total} samples can be used: {reasons}")
    _write_tables(staging, accepted, quarantine, len(order), config)
    seconds = time.monotonic() - started
    return PreprocessReport(
        promised=plan.total,
        accepted=len(accepted),
        quarantined=len(quarantine),
        left_out=Counter(rows["outcome"].to_pylist())[LEFT_OUT],
        missing=plan.lost,
        reasons=reasons,
        splits=by_split_and_style(accepted),
        split_groups=groups_by_split(accepted),
        digests=plan.digests,
        damaged_shards=tuple(map(str, plan.problems)),
        seconds=round(seconds, 2),
        images_per_s=round(decoded / seconds, 1),
        stats=stats,
    )


def _staged_outcomes(folder: Path) -> pa.Table:
    """SETTLED of every staged row, the label of its shard stored once."""
    fields = [
        pa.field("shard", pa.dictionary(pa.int32(), pa.string())) if f.name == "shard" else f
        for f in STAGED
    ]
    stored = pads.ParquetFileFormat(read_options={"dictionary_columns": {"shard"}})
    return pads.dataset(folder, schema=pa.schema(fields), format=stored).to_table(list(SETTLED))


@dataclass(frozen=True)
class _Stager:
    """Decodes samples of a shard and puts the rows into its folder, a file at a time."""

    decoder: Decoder
    folders: Mapping[str, str]
    rows_a_file: int

    def __call__(self, samples: Samples) -> pa.Table:
        """One row a file written: the outcomes of its samples."""
        told = []
        for start in range(0, len(samples), self.rows_a_file):
            piece = samples[start : start + self.rows_a_file]
            table = self.decoder.table(piece)
            folder = Path(self.folders[piece[0]["shard"]])
            folder.mkdir(exist_ok=True)
            name = f"{piece[0]['number']:09d}.parquet"
            with publishing(folder / name) as path:
                pq.write_table(table, path, compression="lz4")
            told.append({"outcomes": table["outcome"].to_pylist()})
        return_memory()
        return pa.Table.from_pylist(told)


def _decode(
    plan: _Plan,
    target: Path,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None,
) -> tuple[int, str]:
    """Read, decode and stage the shards that are not staged yet.

    Returns:
        How many samples that were, and Ray Data's statistics.
    """
    folders = {s.label: str(target / f"{place:05d}") for place, s in enumerate(plan.shards)}
    waiting = [shard for shard in plan.shards if not _is_staged(Path(folders[shard.label]), shard)]
    if not waiting:
        return 0, "every shard was decoded before"
    for shard in waiting:
        shutil.rmtree(folders[shard.label], ignore_errors=True)
    groups = None if data.limit is None else _first_groups(plan, data.limit, data.split_seed)
    rows_a_file = max(1, ROW_GROUP_BYTES // (3 * config.image_size**2))
    stager = _Stager(Decoder(groups, data, config), folders, rows_a_file)
    dataset = map_samples(waiting, plan.filesystem, stager, tasks=task_slots())
    before = sum(s.samples for s in plan.shards) - sum(s.samples for s in waiting)
    done, reasons = 0, Counter[str]()
    with warnings.catch_warnings():  # a set of few blocks is no mistake
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        for told in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            for outcomes in told["outcomes"].to_pylist():
                done += len(outcomes)
                reasons.update(o for o in outcomes if o not in (ACCEPTED, LEFT_OUT))
            check_fraction(reasons, plan.total, config.max_bad_fraction)  # a poisoned run ends here
            if on_progress is not None:
                on_progress(Progress(share=(before + done) / plan.total, step=before + done))
    return done, str(dataset.stats())


def _is_staged(folder: Path, shard: ShardFile) -> bool:
    """Whether an earlier run decoded the whole shard."""
    rows = sum(pq.read_metadata(path).num_rows for path in folder.glob("[0-9]*.parquet"))
    return rows == shard.samples


def _first_groups(plan: _Plan, limit: int, seed: int) -> frozenset[str]:
    """The first `limit` groups by hash: a random choice that more data hardly changes."""

    def groups(samples: Samples) -> pa.Table:
        found = {group for group in map(group_of, (s["record"] for s in samples)) if group}
        return pa.table({"group": pa.array(sorted(found), pa.string())})

    rows = map_samples(plan.shards, plan.filesystem, groups, tasks=task_slots()).take_all()
    found = {row["group"] for row in rows}
    return frozenset(sorted(found, key=lambda g: (hash_fraction("limit", g, seed), g))[:limit])


def _write_tables(
    staging: Path,
    accepted: pa.Table,
    quarantine: pa.Table,
    shards: int,
    config: PreprocessConfig,
) -> None:
    """Final tables from the staged rows, a Ray task a shard; rows come in order of shards.

    No more tasks at once than truly run at once: every one holds its shard's pixels.
    """
    final = staging / FINAL
    shutil.rmtree(final, ignore_errors=True)
    for name in ("pixels", "quarantine"):
        (final / name).mkdir(parents=True)
    pq.write_table(quarantine, final / "quarantine" / "00000.parquet")
    group_rows = max(1, ROW_GROUP_BYTES // (3 * config.image_size**2))
    write = ray.remote(_write_pixels)
    running: list[ray.ObjectRef] = []
    edges = np.searchsorted(accepted["place"].to_numpy(), np.arange(shards + 1))
    for place, (start, end) in enumerate(pairwise(edges)):
        if start < end:
            here = accepted["number"].slice(start, end - start).combine_chunks()
            folder = staging / "staged" / f"{place:05d}"
            target = final / "pixels" / f"{place:05d}.parquet"
            if len(running) == task_slots():
                done, running = ray.wait(running)
                ray.get(done)
            running.append(write.remote(folder, here, target, group_rows))
    ray.get(running)


def _write_pixels(folder: Path, numbers: pa.Array, target: Path, group_rows: int) -> None:
    """The accepted rows of one shard, sorted by key."""
    wanted = pc.field("number").isin(numbers)
    table = pads.dataset(folder, schema=STAGED).to_table(PIXELS.names, filter=wanted)
    order = pc.sort_indices(table["key"])
    # rows are taken from one piece, whose offsets may need more than 32 bits
    images = table["image"].cast(pa.large_binary()).combine_chunks()
    table = table.drop_columns("image").combine_chunks()
    repeated = [name for name in PIXELS.names if name not in ("key", "image")]
    with pq.ParquetWriter(target, PIXELS, compression="zstd", use_dictionary=repeated) as writer:
        for start in range(0, len(order), group_rows):
            rows = order.slice(start, group_rows)
            taken = table.take(rows).append_column("image", images.take(rows).cast(pa.binary()))
            writer.write_table(taken.select(PIXELS.names))
    del table, images
    pa.default_memory_pool().release_unused()  # the process goes on with other work
    return_memory()
