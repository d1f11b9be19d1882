"""Steady load for a long time: no failure, and memory that stays where it settled.

TESSERA_SOAK_S=1800 pytest -m slow tests/serve/test_soak.py
"""

from __future__ import annotations

import os
import threading

import harness
import numpy as np
import psutil
import pytest

from jobs.bench import Load, bench

SOAK_S = float(os.environ.get("TESSERA_SOAK_S", "120"))
MOST_MB = 30.0
"""What a process may grow by from the first quarter on; a picture leaked at every request (12 kB
here) would be more after a minute."""


@pytest.mark.slow
def test_memory_stays_flat_under_load(server: harness.Running) -> None:
    mine = psutil.Process().children(recursive=True)
    (ingress,) = [p for p in mine if "ServeReplica:tessera:api" in " ".join(p.cmdline())]
    watched = {"generator": psutil.Process(server.pid()), "ingress": ingress}
    sizes: dict[str, list[float]] = {name: [] for name in watched}
    done = threading.Event()

    def watch() -> None:
        while not done.wait(SOAK_S / 60):
            for name, process in watched.items():
                sizes[name].append(process.memory_info().rss / 2**20)

    watcher = threading.Thread(target=watch)
    watcher.start()
    (result,) = bench(Load(server.url, duration_s=SOAK_S), concurrencies=[4], rates=[])
    done.set()
    watcher.join()
    assert result.requests > SOAK_S and not result.errors, result
    for name, mb in sizes.items():
        quarter = len(mb) // 4
        grown = float(np.median(mb[-quarter:]) - np.median(mb[quarter : 2 * quarter]))
        print(f"{name}: {mb[quarter]:.0f} to {mb[-1]:.0f} MB, {result.requests} requests")
        assert grown < MOST_MB, f"{name} grew by {grown:.0f} MB: {mb}"
