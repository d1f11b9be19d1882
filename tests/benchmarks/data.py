"""Speed and memory of the data path, beside plain webdataset and beside decoding alone.

    python tests/benchmarks/data.py speed SET SET --repeats 3
    python tests/benchmarks/data.py memory SET SET --times 10

A SET is a local directory that `tessera ingest` wrote. Both commands print JSON.

`speed` runs these four on all cores, one after another, --repeats times over:

    decode      a tight loop that decodes images held in memory: the upper bound
    webdataset  one epoch of a DataLoader over the same tars: decode, square, resize, augment, batch
    preprocess  Tessera's preprocessing in a Ray session just started, whose workers are not up yet
    feed        one epoch of augmented batches from what preprocess wrote, one rank per core

All four decode and augment with Tessera's own functions. Starting Ray and the imports of this
process are not counted; the imports of worker processes are.

`memory` reports the peak memory of preprocessing and of one epoch, for the sets as they are and
for --times copies of them under new keys: heaps with shared memory, and the same with mapped files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing as mp
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import webdataset
from measure import tree_bytes
from torch.utils.data import DataLoader

from pipeline.config import AugmentConfig, DataConfig, PreprocessConfig
from pipeline.contracts import Sample
from pipeline.data.preprocess.decode import BadImage, decode
from pipeline.data.preprocess.job import preprocess
from pipeline.data.preprocess.rows import parse_record
from pipeline.data.shards.manifest import read_manifest
from pipeline.data.shards.tars import IMAGE_EXTENSIONS, read_samples
from pipeline.data.shards.writer import write_shards
from pipeline.images.augment import Augment
from pipeline.runtime import available_cpus, start_ray
from pipeline.training.datasets import ImageDataset
from pipeline.training.feed import training_batch

BATCH = 64
PREPROCESS = PreprocessConfig(image_size=64, require_captions=False, max_bad_fraction=1.0)
DATA = DataConfig(validation_fraction=1e-12, test_fraction=1e-12)  # none is held out
AUGMENT = AugmentConfig(flip=0.5, random_crop=0.6, color=0.4, rotate=5.0)
EPOCHS = (1, 3, 10)
FEEDING = "feeding"  # said by the watched process when it comes to that


def tars(sets: list[str]) -> list[str]:
    """The shards of the sets."""
    return [str(Path(s) / shard.file) for s in sets for shard in read_manifest(s).shards]


def encoded(sets: list[str]) -> Iterator[bytes]:
    """Every image as it is stored."""
    for path in tars(sets):
        with Path(path).open("rb") as stream:
            yield from (s.image for s in read_samples(stream) if s.image is not None)


# ---- what is compared ----------------------------------------------------------------------------


def decode_alone(sets: list[str]) -> tuple[float, int]:
    """Seconds, and number of images, of decoding on all cores; all are read before."""
    cores, images = available_cpus(), list(encoded(sets))
    context = mp.get_context("fork")
    barrier = context.Barrier(cores + 1)
    workers = [
        context.Process(target=_decode_all, args=(images[i::cores], barrier)) for i in range(cores)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    began = time.monotonic()
    for worker in workers:
        worker.join()
    return time.monotonic() - began, len(images)


def _decode_all(images: list[bytes], barrier: Any) -> None:
    barrier.wait()
    for image in images:
        try:
            decode(image, PREPROCESS)
        except BadImage:
            continue


def plain_webdataset(sets: list[str]) -> tuple[float, int]:
    """Seconds, and number of images, of an epoch of augmented batches from a DataLoader."""
    paths = tars(sets)
    data = (
        webdataset.WebDataset(paths, shardshuffle=len(paths), seed=0, empty_check=False)
        .shuffle(1_000)
        .map(_decoded, handler=webdataset.ignore_and_continue)
        .batched(BATCH, collation_fn=torch.stack)
        .map(_augmented)
    )
    loader = DataLoader(data, batch_size=None, num_workers=available_cpus())
    began = time.monotonic()
    found = sum(len(batch) for batch in loader)
    return time.monotonic() - began, found


def _decoded(sample: dict[str, Any]) -> torch.Tensor:
    encoded = next(sample[name] for name in IMAGE_EXTENSIONS if name in sample)
    return torch.from_numpy(decode(encoded, PREPROCESS))


def _augmented(batch: torch.Tensor) -> torch.Tensor:
    torch.set_num_threads(1)
    augmented: torch.Tensor = Augment(AUGMENT)(batch)
    return augmented


def preprocessed(sets: list[str], output: Path) -> tuple[float, int, dict[str, Any]]:
    """Seconds, number of images promised, and the report, of preprocessing with cold workers."""
    start_ray()
    try:
        began = time.monotonic()
        report = preprocess(sets, output, data=DATA, config=PREPROCESS)
        seconds = time.monotonic() - began
    finally:
        ray.shutdown()
    return seconds, report.promised, dataclasses.asdict(report)


def feed_epoch(pixels: Path) -> tuple[float, int]:
    """Seconds, and number of images, of an epoch of augmented batches; opening the data counts."""
    world = available_cpus()
    context = mp.get_context("fork")
    queue = context.Queue()
    began = time.monotonic()
    ranks = [context.Process(target=_rank, args=(pixels, i, world, queue)) for i in range(world)]
    for rank in ranks:
        rank.start()
    found = sum(queue.get() for _ in ranks)
    for rank in ranks:
        rank.join()
    return time.monotonic() - began, found


def _rank(pixels: Path, rank: int, world_size: int, queue: Any) -> None:
    torch.set_num_threads(1)
    data = ImageDataset.from_parquet(pixels, image_size=PREPROCESS.image_size, split="train")
    augment, found = Augment(AUGMENT), 0
    for step in range(len(data) // (BATCH * world_size)):
        batch = training_batch(
            data, step, batch_size=BATCH * world_size, seed=0, rank=rank, world_size=world_size
        )
        found += len(augment(batch["images"], seeds=batch["seeds"]))
    queue.put(found)


# ---- speed ---------------------------------------------------------------------------------------


def speed(sets: list[str], repeats: int, scratch: Path) -> dict[str, Any]:
    """Rates in images per second, and ratios of rates from the same repeat."""
    rounds = []
    for number in range(repeats):
        output = scratch / f"out{number}"
        bound = _rate(*decode_alone(sets))
        plain = _rate(*plain_webdataset(sets))
        seconds, promised, report = preprocessed(sets, output)
        fed_seconds, fed = feed_epoch(output / "pixels")
        prepared, feeding = promised / seconds, fed / fed_seconds
        ratios = {
            f"ours / webdataset, {epochs} epochs": _over(prepared, feeding, epochs) / plain
            for epochs in EPOCHS
        }
        rounds.append(
            {
                "decode": bound, "webdataset": plain, "preprocess": prepared, "feed": feeding,
                "feed / webdataset": feeding / plain, "preprocess / decode": prepared / bound,
                **ratios,
            }
        )  # fmt: skip
        print(json.dumps({k: round(v, 3) for k, v in rounds[-1].items()}), file=sys.stderr)
    middle = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    spread = {n: [min(r[n] for r in rounds), max(r[n] for r in rounds)] for n in rounds[0]}
    return {
        "images": report["promised"], "accepted": report["accepted"], "repeats": repeats,
        "median": middle, "from_to": spread,
    }  # fmt: skip


def _rate(seconds: float, images: int) -> float:
    return images / seconds


def _over(prepared: float, feeding: float, epochs: int) -> float:
    """Images trained on per second, when one preprocessing feeds so many epochs."""
    return epochs / (1 / prepared + epochs / feeding)


# ---- memory --------------------------------------------------------------------------------------


def copies(sets: list[str], times: int) -> Iterator[Sample]:
    """The samples of the sets, `times` over, each time under other keys."""
    for time_ in range(times):
        for number, path in enumerate(tars(sets)):
            with Path(path).open("rb") as stream:
                for sample in read_samples(stream):
                    said = parse_record(sample.files["json"]) | {"captions": ()}
                    extension = next((e for e in IMAGE_EXTENSIONS if e in sample.files), "png")
                    yield Sample(
                        key=f"{time_}-{number}-{sample.key}", image=sample.image or b"",
                        extension=extension, **said,
                    )  # fmt: skip


def memory(sets: list[str], times: int, scratch: Path) -> dict[str, Any]:
    """Peaks in MB of preprocessing and an epoch, for the sets and for `times` copies."""
    found = {}
    for count in (1, times):
        home = scratch / f"x{count}"
        manifest = write_shards(copies(sets, count), home / "set", max_bytes=8_000_000)
        command = [sys.executable, __file__, "once", str(home / "set"), "--out", str(home / "out")]
        found[count] = {"images": manifest.samples} | _peak(command)
    ratios = {
        f"{name} ratio": found[times][name] / found[1][name]
        for name in found[1]
        if name.endswith("_mb")
    }
    return {str(count): values for count, values in found.items()} | ratios


def _peak(command: list[str]) -> dict[str, Any]:
    """Peak memory in MB, of preprocessing and of feeding: of all processes, of the driver, of its
    largest worker, all without mapped files; and of all processes with them. And which processes
    there were when they were largest together."""
    peak: dict[str, float] = {}
    largest: dict[str, float] = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    root, phase = psutil.Process(process.pid), "preprocess"
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        if FEEDING.encode() in (process.stdout.read() or b""):
            phase = "feed"
        sizes = {n: s / 1e6 for n, s in tree_bytes(root, mapped_files=False).items()}
        driver = sum(s for name, s in sizes.items() if name.endswith(f" {process.pid}"))
        others = [s for name, s in sizes.items() if not name.endswith(f" {process.pid}")]
        now = {
            "all_mb": sum(sizes.values()),
            "driver_mb": driver,
            "largest_worker_mb": max(others, default=0.0),
            "all_with_mapped_files_mb": sum(tree_bytes(root).values()) / 1e6,
        }
        if now["all_mb"] > peak.get("job_all_mb", 0.0):
            largest = sizes
        for name, size in now.items():
            for scope in (phase, "job"):
                key = f"{scope}_{name}"
                peak[key] = max(peak.get(key, 0.0), size)
        time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    by_size = sorted(largest.items(), key=lambda item: -item[1])
    return peak | {"at_peak": {name: round(size) for name, size in by_size[:16]}}


def once(sets: list[str], output: Path) -> dict[str, Any]:
    """Preprocess and feed an epoch, to be watched from outside."""
    preprocessed(sets, output)
    print(FEEDING, flush=True)
    feed_epoch(output / "pixels")
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("speed", "memory", "once"))
    parser.add_argument("sets", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "once":
        once(arguments.sets, arguments.out)
        return
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.what == "speed":
            found = speed(arguments.sets, arguments.repeats, Path(scratch))
        else:
            found = memory(arguments.sets, arguments.times, Path(scratch))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
