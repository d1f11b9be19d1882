"""The check that a model can be served: the real service in a process of its own, and its verdicts.

What a service can do wrong is shown to the check over HTTP, by the one that the other tests share.
"""

from __future__ import annotations

import io
import os
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from harness import SLOW_S, Running
from PIL import Image

from pipeline.bundles.bundle import BundleManifest, read_bundle
from pipeline.config import CanaryConfig
from pipeline.errors import PromotionError
from serve.canary import ServableReport, check_servable, draw, flaw

MARK = "TESSERA_TEST_CANARY"


@pytest.fixture
def home(tmp_path: Path, pretrained_cache: Path) -> Path:
    (tmp_path / "pretrained").symlink_to(pretrained_cache)
    return tmp_path


@pytest.fixture
def nothing_stays(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fails if a process that the check began is alive when the test has ended."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)
    yield
    deadline = time.monotonic() + 30
    while alive := _marked(mark):
        assert time.monotonic() < deadline, alive
        time.sleep(0.5)


def _marked(mark: str) -> list[str]:
    found = list[str]()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process.name())
        except psutil.Error:
            continue
    return found


# ---- In a process of its own ---------------------------------------------------------------------


@pytest.mark.slow  # tests/jobs/test_plugins.py has one that every run sees
def test_a_real_bundle_is_served_and_draws(
    tiny_bundle: Path, home: Path, nothing_stays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7:6379")  # a cluster that it must leave alone
    report = check_servable(tiny_bundle, home, CanaryConfig(prompts=("a red apple", "一只猫")))
    assert report.servable and len(report.latencies_s) == 2 + len(("noto", "twemoji"))
    assert 0 < report.p95_s < report.seconds


@pytest.mark.slow
def test_a_truncated_file_of_weights_is_found(
    tiny_bundle: Path, home: Path, nothing_stays: None
) -> None:
    broken = home / "broken"
    for file in tiny_bundle.rglob("*.*"):
        target = broken / file.relative_to(tiny_bundle)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(
        PromotionError, match=r"broken cannot be served: the model did not load: .*BundleError"
    ):
        check_servable(broken, home, CanaryConfig())


@pytest.mark.slow
def test_a_latency_that_cannot_be_kept_is_found(
    tiny_bundle: Path, home: Path, nothing_stays: None
) -> None:
    with pytest.raises(PromotionError, match=r"took up to .* promote\.canary\.max_latency_s=0\.0"):
        check_servable(tiny_bundle, home, CanaryConfig(max_latency_s=0.001))


def test_a_check_without_end_is_ended(tiny_bundle: Path, home: Path, nothing_stays: None) -> None:
    with pytest.raises(PromotionError, match=r"servable within 8 s: raise promote\.canary\.time"):
        check_servable(tiny_bundle, home, CanaryConfig(timeout_s=8))


def test_a_check_that_breaks_is_told_by_its_last_lines(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = home / "python"
    broken.write_text("#!/bin/sh\nfor line in 1 2 3 4 5 6; do echo line $line >&2; done; exit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(PromotionError, match=r"status 3 and no result\n  line 2\n(.*\n)*  line 6$"):
        check_servable(home, home, CanaryConfig())


# ---- What it sees --------------------------------------------------------------------------------


def drawn(
    server: Running, manifest: BundleManifest, *prompts: str, **limits: Any
) -> ServableReport:
    return draw(server.url, manifest, CanaryConfig(prompts=prompts, **limits))


def test_every_prompt_and_every_style_is_drawn(server: Running, tiny_bundle: Path) -> None:
    before = len(server.batch_sizes())
    report = drawn(server, read_bundle(tiny_bundle), "a red apple", "一只猫", "dog")
    assert report.problems == () and len(report.latencies_s) == 5
    assert len(server.batch_sizes()) > before
    assert report.to_dict()["servable"] is True


def test_slow_images_failures_and_wrong_sizes_are_problems(
    server: Running, tiny_bundle: Path
) -> None:
    manifest = read_bundle(tiny_bundle)
    slow = drawn(server, manifest, "slow cat", max_latency_s=SLOW_S / 2)
    assert len(slow.problems) == 1 and slow.p95_s >= SLOW_S
    assert "95 % of the images took up to " in slow.problems[0]
    failed = drawn(server, manifest, "a cat", "explode")
    assert [problem[:40] for problem in failed.problems] == [
        "'explode': the service answered 500: {\"e"
    ] * 2
    large = manifest.model_copy(update={"image_size": 128})
    problem, *_ = drawn(server, large, "a cat").problems
    assert problem == "'a cat': the image is 64x64 pixels, not 128x128"
    style = cast(
        BundleManifest, SimpleNamespace(image_size=64, model_spec=SimpleNamespace(styles=("oil",)))
    )
    (problem,) = drawn(server, style, "a cat").problems
    assert "style" in problem
    gone = draw("http://127.0.0.1:9", manifest, CanaryConfig(prompts=("a cat",)))
    assert "did not answer" in gone.problems[0]


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind)
    return stream.getvalue()


def test_an_image_must_be_one() -> None:
    circle = Image.new("RGB", (64, 64), "white")
    circle.paste((250, 20, 20), (10, 10, 40, 40))
    assert flaw(png(circle), 64) is None
    assert flaw(png(circle), 32) == "the image is 64x64 pixels, not 32x32"
    assert "of one colour" in str(flaw(png(Image.new("RGB", (64, 64), "grey")), 64))
    nearly = Image.new("RGB", (64, 64), (128, 128, 128))
    nearly.putpixel((3, 3), (133, 128, 128))
    assert "spans more than 5 of 256" in str(flaw(png(nearly), 64))
    for broken in (b"", b"<html>", png(circle)[:-40], png(circle, "GIF")):
        assert str(flaw(broken, 64)).startswith("what came is no image"), broken[:10]


def test_the_latency_is_that_of_95_percent() -> None:
    of = [ServableReport((), tuple(map(float, range(1, n + 1)))).p95_s for n in (1, 8, 20, 40)]
    assert of == [1, 8, 19, 38]
