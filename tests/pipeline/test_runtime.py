"""What processes start with, and what they do with the memory they free."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys

import pytest

from pipeline.runtime import RayPrints, set_environment

SCRIPT = """
import resource
from pathlib import Path
from pipeline.runtime import return_memory

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

blocks = [bytearray(2_000_000) for _ in range(300)]
last = blocks[-1]
del blocks
kept = resident_mb()
return_memory(beyond_mb=10_000)
untouched = resident_mb()
return_memory(beyond_mb=100)
print(kept, untouched, resident_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator is what keeps memory")
def test_freed_memory_is_kept_until_it_is_returned() -> None:
    settings = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
    told = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | settings, capture_output=True, check=True
    )
    kept, untouched, returned = map(int, told.stdout.split())
    assert kept > 550 and untouched > 550 and returned < kept - 450


def test_the_users_environment_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.delenv("RAY_DEDUP_LOGS", raising=False)
    set_environment()
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    assert os.environ["RAY_DEDUP_LOGS"] == "1"


def test_what_ray_prints_is_shown_but_for_the_expected_warning() -> None:
    shown = io.StringIO()
    with contextlib.redirect_stdout(RayPrints(shown)):
        print("(raylet) WARNING: 8 PYTHON worker processes have been started on node: f593")
        print("(raylet) Raylet is terminated.")
        print()
    assert shown.getvalue() == "(raylet) Raylet is terminated.\n\n"


def test_the_ground_floor_imports_neither_ray_nor_pytorch() -> None:
    """Each takes seconds to import, which a command that finds its work done need not wait for."""
    light = (
        "runtime", "progress", "artifacts", "tracking.runs", "bundles.registry",
        "text.pretrained", "text.encoder_identity",
    )  # fmt: skip
    script = f"import sys, {', '.join(f'pipeline.{name}' for name in light)}; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert not {"ray", "torch", "transformers", "mlflow"} & set(told.stdout.split())
