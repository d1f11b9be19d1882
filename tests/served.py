"""`tessera serve` as a user starts it: a process and a Ray of its own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

TESSERA = [sys.executable, "-m", "jobs.cli"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def tessera_serve(
    *arguments: str, ready_timeout_s: float, **options: Any
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its URL, once it draws, and its process, which the test ends; killed if it still runs then.

    `options` are subprocess.Popen's.
    """
    port = free_port()
    command = [*TESSERA, "serve", *arguments, "--port", str(port)]
    process = subprocess.Popen(command, text=True, **options)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + ready_timeout_s
        while not ready(url):
            assert process.poll() is None and time.monotonic() < deadline, "did not come up"
            time.sleep(0.5)
        yield url, process
    finally:
        process.kill()


def ready(url: str) -> bool:
    """Whether the service there draws."""
    try:
        with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
