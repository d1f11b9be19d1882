"""Run a command and report its wall time and the peak memory of all its processes.

    python tests/benchmarks/measure.py tessera demo --no-serve --home NEW

Memory is the proportional set size (shared pages counted once), sampled every second over the
command's whole process tree, which a local Ray belongs to.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import psutil


def tree_bytes(root: psutil.Process) -> int:
    """Proportional set size of a process and everything below it."""
    total = 0
    for process in [root, *root.children(recursive=True)]:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue  # it ended between the listing and the look
    return total


def main(command: list[str]) -> int:
    """Returns the command's exit status."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, tree_bytes(root))
        time.sleep(1.0)
    print(
        json.dumps(
            {
                "command": " ".join(command),
                "exit": process.returncode,
                "seconds": round(time.monotonic() - began, 1),
                "peak_gb": round(peak / 2**30, 2),
            }
        )
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
