"""Runs a command and reports its wall time and the peak memory of all its processes.

    python tests/benchmarks/measure.py tessera demo --no-serve --home NEW

Memory is the proportional set size (shared pages counted once) of the command's whole process tree,
which a local Ray belongs to, sampled every second. The largest processes at the peak are named.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil


def tree_bytes(root: psutil.Process, *, mapped_files: bool = True) -> dict[str, int]:
    """Proportional set size of a process and everything below it, by process title and id.

    Without mapped files, which the system drops and reads again as it likes, what is left is heaps
    and shared memory, such as Ray's object store.
    """
    sizes = {}
    for process in [root, *root.children(recursive=True)]:
        try:
            title = Path((process.cmdline() or [process.name()])[0]).name
            sizes[f"{title} {process.pid}"] = _bytes(process.pid, mapped_files)
        except (psutil.Error, OSError):
            continue  # the process ended after it was listed
    return sizes


def _bytes(pid: int, mapped_files: bool) -> int:
    rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kilobytes = {name: int(text.split()[0]) for name, text in (row.split(":") for row in rows)}
    return 1024 * (kilobytes["Pss"] - (0 if mapped_files else kilobytes["Pss_File"]))


def main(command: list[str]) -> int:
    """Run the command and print what it took as a line of JSON; its exit status."""
    began, peak, peak_at, largest = time.monotonic(), 0, 0.0, dict[str, int]()
    process = subprocess.Popen(command)
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = tree_bytes(root)
        if sum(sizes.values()) > peak:
            peak, peak_at, largest = sum(sizes.values()), time.monotonic() - began, sizes
        time.sleep(1.0)
    by_size = sorted(largest.items(), key=lambda item: -item[1])
    print(
        json.dumps(
            {
                "command": " ".join(command),
                "exit": process.returncode,
                "seconds": round(time.monotonic() - began, 1),
                "peak_gb": round(peak / 2**30, 2),
                "peak_at_s": round(peak_at, 1),
                "processes_at_peak": len(by_size),
                "largest_gb": {name: round(size / 2**30, 2) for name, size in by_size[:12]},
            }
        )
    )
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
