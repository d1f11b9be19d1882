"""The check that a model can be served, made before it becomes champion.

    python -m serve.canary BUNDLE --home .tessera     # JSON; exit status 0: it can, 1: it cannot

    report = check_servable(bundle, home, CanaryConfig(max_latency_s=5))

A process of its own starts a Ray of its own, in it the application as `tessera serve` builds it, on
a free port of this machine, and draws a few images over HTTP: every prompt in the model's default
style, and one in each of its styles. Each must come as an image of the model's size that is not of
one colour, and 95 % of them within the latency limit. Whatever happens, all of it is shut down.

The check runs on the machine that asks for it: where replicas run on other hardware, the latency
limit has to be one for this machine.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.bundles.bundle import BundleManifest, read_bundle
from pipeline.config import CanaryConfig, ServeConfig
from pipeline.errors import PromotionError, TesseraError
from pipeline.runtime import set_environment
from serve.launch import DIRECT, start_server
from serve.settings import ServiceConfig, resolve_service

FLAT = 8
"""Levels, of 256, that a channel must span at least, else the image counts as of one colour."""
QUANTILE = 0.95
"""Share of the images that must come within the latency limit."""
_LINES = 5  # of a failed check's output that are told
_NOT_ITS_OWN = ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_SERVE_ENABLE_HA_PROXY")
"""Environment variables of another cluster's jobs, which the check must not join."""


@dataclass(frozen=True)
class ServableReport:
    """What the check found.

    Attributes:
        problems: why the model cannot be served, one sentence each; empty if it can.
        latencies_s: seconds of each image that was drawn, from request to answer.
        seconds: of the whole check.
    """

    problems: tuple[str, ...]
    latencies_s: tuple[float, ...] = ()
    seconds: float = 0.0

    @property
    def servable(self) -> bool:
        """Whether the model can be served."""
        return not self.problems

    @property
    def p95_s(self) -> float:
        """The latency, in seconds, that 95 % of the images kept (nearest rank); NaN for none."""
        ranked = sorted(self.latencies_s)
        return ranked[math.ceil(QUANTILE * len(ranked)) - 1] if ranked else math.nan

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        p95 = self.p95_s if self.latencies_s else None
        return {"servable": self.servable, "p95_s": p95, **asdict(self)}


def check_servable(bundle: Path, home: Path, canary: CanaryConfig) -> ServableReport:
    """Serve a bundle and draw with it, in a process of its own.

    Args:
        bundle: its directory.
        home: the directory of converted pretrained models.
        canary: prompts and limits.

    Raises:
        PromotionError: it cannot be served, or not within the limits; the message says why.
    """
    command = [
        *(sys.executable, "-m", "serve.canary", str(bundle), "--home", str(home.absolute())),
        *(f"--max-latency-s={canary.max_latency_s}", f"--timeout-s={canary.timeout_s}"),
        *(f"--prompt={prompt}" for prompt in canary.prompts),
    ]
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_ITS_OWN}
    try:
        ended = subprocess.run(
            command, env=environment, capture_output=True, check=False, timeout=canary.timeout_s
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise PromotionError(
            f"{bundle} was not shown to be servable within {canary.timeout_s:g} s: raise "
            f"promote.canary.timeout_s if this machine is busy{_last_lines(error.stderr or b'')}"
        ) from error
    try:
        found = json.loads(ended.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise PromotionError(
            f"the check whether {bundle} can be served ended with status {ended.returncode} and "
            f"no result{_last_lines(ended.stderr)}"
        ) from error
    report = ServableReport(tuple(found["problems"]), tuple(found["latencies_s"]), found["seconds"])
    if not report.servable:
        raise PromotionError(f"{bundle} cannot be served: {'; '.join(report.problems)}")
    return report


def _last_lines(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()[-_LINES:]
    return "".join(f"\n  {line}" for line in lines)


def examine(bundle: str, home: Path, canary: CanaryConfig) -> ServableReport:
    """Serve a bundle in this process' own Ray, draw with it, and shut everything down."""
    began = time.monotonic()
    try:
        manifest = read_bundle(bundle)
        server = start_server(
            bundle, _service(), home=str(home), port=_free_port(), ready_timeout_s=canary.timeout_s
        )
        try:
            report = draw(server.url, manifest, canary)
        finally:
            server.close()
    except TesseraError as error:
        report = ServableReport((str(error),))
    return replace(report, seconds=time.monotonic() - began)


def draw(url: str, manifest: BundleManifest, canary: CanaryConfig) -> ServableReport:
    """Draw the canary's images with a service, one after the other.

    Args:
        url: of the service, without /v1.
        manifest: of the bundle that it serves.
        canary: prompts and limits.
    """
    problems, latencies = list[str](), list[float]()
    for request in requests(manifest, canary.prompts):
        before = time.monotonic()
        problem = _draw(url, request, manifest.image_size, canary.timeout_s)
        latencies.append(time.monotonic() - before)
        if problem:
            problems.append(f"{request['prompt']!r}: {problem}")
    report = ServableReport(tuple(problems), tuple(latencies))
    if report.p95_s <= canary.max_latency_s:
        return report
    slow = (
        f"95 % of the images took up to {report.p95_s:.2f} s each, more than "
        f"promote.canary.max_latency_s={canary.max_latency_s:g}"
    )
    return replace(report, problems=(*problems, slow))


def requests(manifest: BundleManifest, prompts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The bodies of the requests: each prompt in the default style, then one in every style. None
    names a size, which the service would enlarge any image to."""
    styles = [*(None for _ in prompts), *manifest.model_spec.styles]
    for seed, style in enumerate(styles):
        body = {"prompt": prompts[seed % len(prompts)], "seed": seed}
        yield body if style is None else {**body, "style": style}


def _service() -> ServiceConfig:
    """The settings that `tessera serve` has by default and by its environment, of one replica."""
    service = resolve_service()
    one: ServeConfig = service.serve.model_copy(update={"min_replicas": 1, "max_replicas": 1})
    return service.model_copy(update={"serve": one})


def _draw(url: str, body: dict[str, Any], side: int, timeout_s: float) -> str | None:
    """Draw one image; why it is not as it should be, or None."""
    asked = urllib.request.Request(
        f"{url}/v1/images/generations",
        data=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
    )
    try:
        with DIRECT.open(asked, timeout=timeout_s) as answer:
            content = base64.b64decode(json.load(answer)["data"][0]["b64_json"])
    except urllib.error.HTTPError as error:
        with error:
            return f"the service answered {error.code}: {error.read().decode(errors='replace')}"
    except OSError as error:
        return f"the service did not answer: {error}"
    return flaw(content, side)


def flaw(content: bytes, side: int) -> str | None:
    """Why a file is no image of side x side pixels with something on it, or None.

    Args:
        content: the file's bytes.
        side: pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=["PNG"]).convert("RGB")
    except (OSError, SyntaxError) as error:
        return f"what came is no image: {error}"
    if image.size != (side, side):
        return f"the image is {image.width}x{image.height} pixels, not {side}x{side}"
    span = int(np.ptp(np.asarray(image), axis=(0, 1)).max())
    if span < FLAT:
        return f"the image is of one colour: no channel spans more than {span} of 256 levels"
    return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Check one bundle and print what was found."""
    canary = CanaryConfig()
    parser = argparse.ArgumentParser(prog="python -m serve.canary", description=__doc__)
    parser.add_argument("bundle", help="the bundle's directory, or asset:NAME")
    parser.add_argument("--home", type=Path, default=Path(".tessera"), help="as of `tessera`")
    parser.add_argument("--prompt", action="append", help="what to draw; may be repeated")
    parser.add_argument("--max-latency-s", type=float, default=canary.max_latency_s)
    parser.add_argument("--timeout-s", type=float, default=canary.timeout_s)
    given = parser.parse_args()
    limits = CanaryConfig(
        prompts=tuple(given.prompt or canary.prompts),
        max_latency_s=given.max_latency_s,
        timeout_s=given.timeout_s,
    )
    set_environment()
    for name in _NOT_ITS_OWN:
        os.environ.pop(name, None)
    with contextlib.redirect_stdout(sys.stderr):
        report = examine(given.bundle, given.home, limits)
    sys.stdout.write(json.dumps(report.to_dict(), ensure_ascii=False) + "\n")
    sys.exit(not report.servable)


if __name__ == "__main__":
    main()
