"""Steady load for a long time on `tessera serve`: no failure, and memory stays where it settled.

    TESSERA_SOAK_S=1800 pytest -m slow -s tests/serve/test_soak.py

TESSERA_SOAK_RATE asks for so many pictures a second at random times; unset, four users each ask
again as soon as they are answered.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import pytest
from served import tessera_serve

from jobs.bench import Load, bench

SOAK_S = float(os.environ.get("TESSERA_SOAK_S", "120"))
RATE = float(os.environ.get("TESSERA_SOAK_RATE", "0"))
MOST_MB = 30.0
"""What a replica may grow by after a quarter of its samples; a picture leaked at every request
(12 kB) would be more after 2,500 of them."""


@dataclass(frozen=True)
class Service:
    """A running `tessera serve`."""

    url: str
    process: psutil.Process

    def replicas(self) -> Iterator[tuple[str, float]]:
        """Title and MB of every replica, of the ingress and of the generator."""
        for child in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                title = " ".join(child.cmdline()).partition(".")[0].strip()  # without the method
                if "ServeReplica" in title:
                    yield f"{title} {child.pid}", child.memory_info().rss / 2**20


@pytest.fixture
def service(pretrained_cache: Path, tmp_path: Path) -> Iterator[Service]:
    settings = tmp_path / "service.yaml"
    settings.write_text("result_cache_bytes: 0\n")  # would grow until it is full
    home = str(pretrained_cache.parent)  # whose `pretrained` it is
    arguments = "asset:base", "--home", home, "--config", str(settings)
    with tessera_serve(*arguments, ready_timeout_s=240) as (url, process):
        yield Service(url, psutil.Process(process.pid))
        process.terminate()
        assert process.wait(timeout=120) == 0


@pytest.mark.slow
def test_memory_stays_flat_under_load(service: Service) -> None:
    sizes: defaultdict[str, list[float]] = defaultdict(list)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SOAK_S / 120):
            for name, mb in service.replicas():
                sizes[name].append(mb)

    watcher = threading.Thread(target=watch)
    watcher.start()
    load = Load(service.url, duration_s=SOAK_S)
    (result,) = bench(load, concurrencies=[] if RATE else [4], rates=[RATE] if RATE else [])
    done.set()
    watcher.join()
    assert result.requests > SOAK_S * min(RATE or 1, 1) / 2 and not result.errors, result
    watched = {name: mb for name, mb in sizes.items() if len(mb) > 60}
    assert len(watched) >= 2, sizes
    for name, mb in watched.items():
        quarter = len(mb) // 4
        grown = float(np.median(mb[-quarter:]) - np.median(mb[quarter : 2 * quarter]))
        print(f"{name}: {mb[quarter]:.0f} to {mb[-1]:.0f} MB, {result.requests} requests")
        assert grown < MOST_MB, f"{name} grew by {grown:.0f} MB: {mb}"
