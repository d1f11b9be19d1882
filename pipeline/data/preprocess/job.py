"""Shards -> pixels: read, check, decode, square and resize every image with Ray Data.

What cannot be used goes to a quarantine table with its reason, and every sample that the manifests
promise is accounted for, or the job fails. A truncated tar merely ends early, and Ray Data reports
nothing: so shards are verified against their SHA-256 before, and rows are counted after.

    report = preprocess(
        ["asset:emoji"], Path("pixels"), data=DataConfig(), config=PreprocessConfig()
    )

The output replaces what was there in one move, and the same shards give the same bytes. A job that
was killed at any moment and is run again goes on where it stopped: what was decoded is kept beside
the output, shard by shard, until the job is done (pipeline/data/preprocess/staging.py). It writes

    pixels/*.parquet       key, group, style, split, image (uint8, 3 x S x S bytes), captions,
                           source, license, attribution, shard; one file per shard, sorted by key
    quarantine/*.parquet   shard, key, reason
    report.json            the PreprocessReport
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs

from pipeline.artifacts import publishing, replace_directory
from pipeline.config import DataConfig, PreprocessConfig
from pipeline.data.preprocess.reader import EncodedSample, ShardFile, map_samples
from pipeline.data.preprocess.report import (
    PreprocessReport,
    bad_among,
    check_bad_fraction,
    check_counts,
    count_by_split_and_style,
    count_groups_by_split,
    quarantine_table,
    resolve_outcomes,
)
from pipeline.data.preprocess.rows import ACCEPTED, LEFT_OUT, RowDecoder, group_of, load_imagehash
from pipeline.data.preprocess.staging import (
    StagingWriter,
    is_staged,
    left_out_captions,
    rows_per_group,
    shard_folder,
    staged_outcomes,
    write_tables,
)
from pipeline.data.preprocess.workers import worker_errors
from pipeline.data.shards.manifest import (
    Problem,
    check_one_file_system,
    locate,
    open_shards,
    read_manifest,
    verify,
)
from pipeline.data.shards.splits import hash_fraction
from pipeline.errors import DataError
from pipeline.progress import OnProgress, Progress
from pipeline.runtime import task_slots

LOG = logging.getLogger(__name__)
JOB, STAGED_ROWS, FINAL = "plan.json", "staged", "final"  # within the staging folder
STAGING_FORMAT = 3  # of what is in it; another one is not gone on with


@dataclass(frozen=True)
class _ShardPlan:
    """The shards to read, and what the manifests promise.

    Attributes:
        filesystem: where the shards are.
        shards: whole ones, in reading order.
        missing: samples in damaged shards.
        problems: the damaged shards.
        digests: the shard sets' dataset digests, in their order.
    """

    filesystem: pyarrow.fs.FileSystem
    shards: tuple[ShardFile, ...]
    missing: int
    problems: tuple[Problem, ...]
    digests: tuple[str, ...]

    @property
    def promised(self) -> int:
        """Samples in all shards, whole or damaged."""
        return self.missing + sum(shard.samples for shard in self.shards)

    @property
    def shard_index(self) -> dict[str, int]:
        """By its label, each whole shard's place in the reading order."""
        return {shard.label: index for index, shard in enumerate(self.shards)}


def preprocess(
    shard_sets: Sequence[str],
    output: Path,
    *,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None = None,
) -> PreprocessReport:
    """Shard sets -> pixels, quarantine and report in the folder `output`. Ray must be running.

    Args:
        shard_sets: folders, URIs or asset:NAME, all on one file system.
        output: on a disk that every Ray node sees.
        data: split, limit, and whether damaged shards are tolerated (`data.shards` is not read).
        config: the images' size and what is quarantined.
        on_progress: called after every block with the share of samples that are decoded.

    Raises:
        DataError: a damaged shard, too many bad samples, none left, or samples unaccounted for.
        ResourceError: the disk is full, or a library that config asks for is missing.
    """
    if config.deduplicate == "perceptual":
        load_imagehash()
    plan = _plan_shards(shard_sets, data)
    output = output.resolve()
    staging = output.with_name(f".{output.name}.partial")
    _prepare(staging, plan, data, config)
    with worker_errors():
        report = _run(plan, staging, data, config, on_progress)
        text = json.dumps(dataclasses.asdict(report), indent=1, ensure_ascii=False)
        (staging / FINAL / "report.json").write_text(text + "\n", encoding="utf-8")
        replace_directory(staging / FINAL, output)
        shutil.rmtree(staging)
    if bad := bad_among(report.reasons):
        listed = ", ".join(f"{reason} {count}" for reason, count in bad.items())
        LOG.warning(
            "%d of %d pictures cannot be used: %s (their keys are in %s)",
            bad.total(), report.promised, listed, output / "quarantine",
        )  # fmt: skip
    return report


def _prepare(staging: Path, plan: _ShardPlan, data: DataConfig, config: PreprocessConfig) -> None:
    """Keep what an interrupted run of the same job left in the staging folder; clear anything else.

    max_bad_fraction is not part of the job: with another limit nothing is decoded again.
    """
    job = {
        "format": STAGING_FORMAT,
        "shards": [[shard.label, shard.samples] for shard in plan.shards],
        "digests": plan.digests,
        "data": data.model_dump(mode="json", exclude={"shards"}),
        "config": config.model_dump(mode="json", exclude={"max_bad_fraction"}),
    }
    text = json.dumps(job)
    record = staging / JOB
    if record.is_file() and record.read_text(encoding="utf-8") == text:
        LOG.info("going on with what an interrupted run left in %s", staging)
        return
    shutil.rmtree(staging, ignore_errors=True)
    (staging / STAGED_ROWS).mkdir(parents=True)
    with publishing(record) as new:
        new.write_text(text, encoding="utf-8")


# ---- Which shards are read -----------------------------------------------------------------------


def _plan_shards(shard_sets: Sequence[str], data: DataConfig) -> _ShardPlan:
    """Read the manifests and verify every shard.

    Raises:
        DataError: no shard set or one twice, or a damaged shard that is not tolerated.
    """
    if not shard_sets:
        raise DataError("no shard set given; data.shards names them")
    if len(set(shard_sets)) < len(shard_sets):
        raise DataError(f"a shard set is named twice: {', '.join(shard_sets)}")
    shards: dict[str, ShardFile] = {}
    problems: list[Problem] = []
    digests, systems, missing = [], [], 0
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
                missing += shard.samples
            else:
                label = f"{name}/{shard.file}"
                while label in shards:  # two sets of one name
                    label = f"{number}-{label}"
                path = f"{root}/{shard.file}"
                shards[label] = ShardFile(
                    label, path, shard.samples, manifest.in_place, shard.prefix
                )
    check_one_file_system(systems, shard_sets)
    plan = _ShardPlan(systems[0], tuple(shards.values()), missing, tuple(problems), tuple(digests))
    _check_problems(plan, data)
    return plan


def _check_problems(plan: _ShardPlan, data: DataConfig) -> None:
    if not plan.problems:
        return
    problems = "; ".join(map(str, plan.problems))
    listed = f"{plan.missing} of {plan.promised} samples are lost: {problems}"
    if not data.allow_missing_shards:
        raise DataError(
            f"{listed}. Write the shards again, or set data.allow_missing_shards=true to go on "
            "without them"
        )
    if not plan.shards:
        raise DataError(f"{listed}. No shard is left to read: write them again")
    LOG.warning("going on although %s", listed)


def _first_groups(plan: _ShardPlan, limit: int, seed: int) -> frozenset[str]:
    """The first `limit` groups by hash: a random choice that additional data hardly changes."""

    def groups(samples: Sequence[EncodedSample]) -> pa.Table:
        found = {group for group in map(group_of, (s["record"] for s in samples)) if group}
        return pa.table({"group": pa.array(sorted(found), pa.string())})

    rows = map_samples(plan.shards, plan.filesystem, groups, tasks=task_slots()).take_all()
    found = {row["group"] for row in rows}
    return frozenset(sorted(found, key=lambda g: (hash_fraction("limit", g, seed), g))[:limit])


# ---- The work ------------------------------------------------------------------------------------


def _run(
    plan: _ShardPlan,
    staging: Path,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None,
) -> PreprocessReport:
    """Decode with Ray Data, resolve the outcomes, write the final tables."""
    started = time.monotonic()
    decoded, stats = _decode(plan, staging / STAGED_ROWS, data, config, on_progress)
    staged = staged_outcomes(staging / STAGED_ROWS)
    check_counts(staged, {shard.label: shard.samples for shard in plan.shards})
    rows = resolve_outcomes(staged, plan.shard_index, config)
    quarantine = quarantine_table(rows)
    reasons = dict(Counter(quarantine["reason"].to_pylist()).most_common())
    check_bad_fraction(reasons, plan.promised, config.max_bad_fraction)
    accepted = rows.filter(pc.equal(rows["outcome"], ACCEPTED))
    if not len(accepted):
        raise DataError(f"none of {plan.promised} samples can be used: {reasons}")
    if lost := left_out_captions(staging / STAGED_ROWS):
        listed = ", ".join(f"{reason} {count}" for reason, count in lost.items())
        LOG.warning("captions left out of samples that have others: %s", listed)
    write_tables(
        staging / STAGED_ROWS,
        staging / FINAL,
        accepted,
        quarantine,
        num_shards=len(plan.shards),
        image_size=config.image_size,
    )
    seconds = time.monotonic() - started
    return PreprocessReport(
        promised=plan.promised,
        accepted=len(accepted),
        quarantined=len(quarantine),
        left_out=Counter(rows["outcome"].to_pylist())[LEFT_OUT],
        missing=plan.missing,
        reasons=reasons,
        captions_left_out=lost,
        splits=count_by_split_and_style(accepted),
        split_groups=count_groups_by_split(accepted),
        digests=plan.digests,
        damaged_shards=tuple(map(str, plan.problems)),
        seconds=round(seconds, 2),
        images_per_s=round(decoded / seconds, 1),
        stats=stats,
    )


def _decode(
    plan: _ShardPlan,
    staged: Path,
    data: DataConfig,
    config: PreprocessConfig,
    on_progress: OnProgress | None,
) -> tuple[int, str]:
    """Read, decode and stage the shards that are not staged yet.

    Returns:
        How many samples that were, and Ray Data's statistics.
    """
    folders = {label: shard_folder(staged, i) for label, i in plan.shard_index.items()}
    waiting = [shard for shard in plan.shards if not is_staged(folders[shard.label], shard)]
    if not waiting:
        return 0, "every shard was decoded before"
    for shard in waiting:
        shutil.rmtree(folders[shard.label], ignore_errors=True)
    groups = None if data.limit is None else _first_groups(plan, data.limit, data.split_seed)
    writer = StagingWriter(
        RowDecoder(groups, data, config),
        {label: str(folder) for label, folder in folders.items()},
        rows_per_group(config.image_size),
    )
    dataset = map_samples(waiting, plan.filesystem, writer, tasks=task_slots())
    before = sum(s.samples for s in plan.shards) - sum(s.samples for s in waiting)
    done, reasons = 0, Counter[str]()
    with warnings.catch_warnings():  # a data set of few blocks is no mistake
        warnings.filterwarnings("ignore", "The maximum number of concurrent tasks")
        blocks = dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        for block in cast(Iterator[pa.Table], blocks):
            outcomes = [o for file in block["outcomes"].to_pylist() for o in file]
            done += len(outcomes)
            reasons.update(o for o in outcomes if o not in (ACCEPTED, LEFT_OUT))
            # a run with too many bad samples ends here, not after the last shard
            check_bad_fraction(reasons, plan.promised, config.max_bad_fraction)
            if on_progress is not None:
                on_progress(Progress(share=(before + done) / plan.promised, step=before + done))
    return done, str(dataset.stats())
