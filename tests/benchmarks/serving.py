"""Measures the image service: throughput, latency, and how it takes failures and new versions.

    python tests/benchmarks/serving.py throughput --home HOME     against offline and other servers
    python tests/benchmarks/serving.py latency --home HOME        added to one image's own time
    python tests/benchmarks/serving.py curve --home HOME          latency by load
    python tests/benchmarks/serving.py swap --home HOME           a moved alias under load
    python tests/benchmarks/serving.py kill --home HOME           kill -9 of a replica under load
    python tests/benchmarks/serving.py autoscale --home HOME      replicas and load, as a plot

Each serves asset:base on a Ray of its own with as many threads as there are CPUs, which the load
generator shares, and prints JSON lines. Speeds vary with what else runs, so they are compared as
ratios within one run. HOME/pretrained keeps the converted caption encoder. RESULTS.md beside this
file holds today's figures, history.md all of them; tests/serve/test_soak.py is the long run.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import ray
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image
from ray import serve
from ray.serve import Application

from jobs.bench import Load, Result, bench
from pipeline.artifacts import resolve_path
from pipeline.bundles.bundle import load_generator
from pipeline.bundles.decisions import Verdict
from pipeline.bundles.registry import ModelRegistry
from pipeline.config import ServeConfig
from pipeline.contracts import GenerationRequest
from pipeline.tracking.runs import Tracker
from serve.app import build_app
from serve.launch import APP_NAME, Server, launch
from serve.listener import Address, listening
from serve.settings import ServiceConfig

BUNDLE = "asset:base"
CPUS = len(os.sched_getaffinity(0))
BATCH, WAIT_S = 8, 0.02
PEERS = Path(__file__).with_name("peers.py")


def say(**values: Any) -> None:
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps(rounded), flush=True)


def config(**other: Any) -> ServeConfig:
    values = {
        "min_replicas": 1, "max_replicas": 1, "max_batch_size": BATCH, "batch_wait_s": WAIT_S,
        "num_cpus": CPUS,
    }  # fmt: skip
    return ServeConfig(**(values | other))


def split(replicas: int) -> ServeConfig:
    """The machine's threads among so many replicas."""
    return config(min_replicas=replicas, max_replicas=replicas, num_cpus=CPUS / replicas)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def served(
    home: Path, config: ServeConfig, model: str = BUNDLE, **service: Any
) -> Iterator[Server]:
    build = partial(build_app, model, ServiceConfig(serve=config, **service), home=str(home))
    server = launch(build, host="127.0.0.1", port=free_port(), ready_timeout_s=300)
    try:
        yield server
    finally:
        server.close()
        ray.shutdown()


@contextlib.contextmanager
def peer(what: str, home: Path, workers: int = 1) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process of peers.py with the machine's threads among so many workers, and its URL."""
    port = free_port()
    command = [
        sys.executable, str(PEERS), what, BUNDLE, "--pretrained", str(home / "pretrained"),
        "--workers", str(workers), "--threads", str(CPUS // workers), "--port", str(port),
        "--batch-size", str(BATCH), "--batch-wait-s", str(WAIT_S),
    ]  # fmt: skip
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        if what == "offline":
            assert process.stdout is not None
            process.stdout.readline()
        else:
            _wait_for(port, process)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[str]) -> None:
    """Until the peer draws."""
    body = json.dumps({"prompt": "a red apple", "seed": 0}).encode()
    url = f"http://127.0.0.1:{port}/v1/images/generations"
    for _ in range(600):
        assert process.poll() is None, f"{process.args} ended"
        with contextlib.suppress(OSError):
            asked = urllib.request.Request(url, body, {"content-type": "application/json"})
            urllib.request.urlopen(asked, timeout=60).read()
            return
        time.sleep(0.2)
    raise TimeoutError(f"{process.args} did not start")


def ask_offline(process: subprocess.Popen[str], what: str) -> dict[str, Any]:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(what + "\n")
    process.stdin.flush()
    answer: dict[str, Any] = json.loads(process.stdout.readline())
    return answer


def load_on(url: str, duration_s: float, seed: int, users: int) -> Result:
    load = Load(url, duration_s=duration_s, seed=seed)
    return bench(load, concurrencies=[users], rates=[])[0]


Saturate = Callable[[float, int], float]  # seconds, seed -> images per second


@contextlib.contextmanager
def contender(name: str, home: Path) -> Iterator[Saturate]:
    """What draws under this name (see CONTENDERS), alone on the machine."""
    if name == "offline":
        with peer(name, home) as (process, _):

            def draw(duration_s: float, seed: int) -> float:
                answer = ask_offline(process, f"draw {duration_s}")
                return float(answer["images"] / answer["seconds"])

            yield draw
        return

    def load(duration_s: float, seed: int) -> float:
        result = load_on(url, duration_s, seed, 2 * BATCH)
        assert not result.errors, result
        return result.images_per_s

    kind, _, workers = name.partition("-")
    if kind in ("fastapi", "litserve"):
        with peer(kind, home, int(workers or 1)) as (_, url):
            yield load
    else:
        shapes = {
            "service": split(1), "unbatched": config(max_batch_size=1, batch_wait_s=0),
            "service-2": split(2),
        }  # fmt: skip
        with served(home, shapes[name]) as server:
            url = server.url
            yield load


CONTENDERS = ("service", "offline", "unbatched", "fastapi", "litserve", "service-2", "litserve-2")


def throughput(args: argparse.Namespace) -> None:
    """Images per second at saturation (two full batches of clients), contenders in turn.

    Each is started for its turn and ended after it, so that none takes anything from another;
    every second round runs backwards. Those with -2 have two workers of half the threads.
    """
    rates: dict[str, list[float]] = {name: [] for name in args.contenders}
    for turn in range(args.rounds):
        for name in args.contenders[:: -1 if turn % 2 else 1]:
            with contender(name, args.home) as saturate:
                saturate(3, 1_000 + turn)
                rates[name].append(saturate(args.duration_s, turn))
        say(turn=turn, **{name: values[-1] for name, values in rates.items()})
    for name, mine in rates.items():
        against = {}
        for other, theirs in rates.items():
            shares = [m / t for m, t in zip(mine, theirs, strict=True)]
            against[other] = [round(f(shares), 3) for f in (statistics.median, min, max)]
        say(name=name, images_per_s=statistics.median(mine), against=against)


@serve.deployment(ray_actor_options={"num_cpus": 0})
class NoModel:
    """Answers at once with as many bytes as an image has."""

    async def generate(self, body: dict[str, Any]) -> bytes:
        return bytes(6_000)


def empty_api(listen: Address) -> FastAPI:
    """An ingress that does nothing but ask `NoModel`, and listens itself as the service's does."""
    api = FastAPI(lifespan=partial(listening, address=listen, max_concurrency=1))
    model = serve.get_deployment_handle(NoModel.name)

    async def answer(request: Request) -> JSONResponse:
        image = await model.generate.remote(await request.json())
        return JSONResponse({"b64_json": base64.b64encode(image).decode()})

    api.add_route("/", answer, methods=["POST"])
    return api


def empty_app(listen: Address) -> Application:
    """Two deployments like the service's."""

    def build() -> FastAPI:
        return empty_api(listen)

    ingress = serve.deployment(name="ingress", ray_actor_options={"num_cpus": 0})
    return ingress(serve.ingress(build)()).bind(NoModel.bind())


def latency(args: argparse.Namespace) -> None:
    """One client: a request, the same image by a bare model call, an empty request, in turn, and
    a model call before each of them.

    What an empty request takes is Ray Serve's own share. With --replicas 2 the service and the
    bare model have half of the threads.
    """
    body = {"prompt": "a red apple", "seed": 0}

    def ask(url: str) -> float:
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        began = time.perf_counter()
        urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60).read()
        return time.perf_counter() - began

    with (
        served(args.home, split(args.replicas), result_cache_bytes=0) as server,
        peer("offline", args.home, args.replicas) as (offline, _),
    ):
        address = Address("127.0.0.1", free_port())
        serve.run(empty_app(address), name="empty", route_prefix="/empty")
        bare, whole, empty = [], [], []
        for seed in range(args.requests + 3):
            body["seed"] = seed
            whole.append(ask(f"{server.url}/v1/images/generations"))
            bare.append(ask_offline(offline, f"one {seed}")["seconds"])
            empty.append(ask(f"{address.url}/"))
            ask_offline(offline, f"one {seed}")  # so that both find the machine in the same state
        bare, whole, empty = bare[3:], whole[3:], empty[3:]
        stages = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    added = [w - b for w, b in zip(whole, bare, strict=True)]
    low, mid, high = np.quantile(added, (0.25, 0.5, 0.75)).tolist()
    say(
        requests=args.requests, bare_median_s=statistics.median(bare),
        service_median_s=statistics.median(whole),
        difference_of_medians_s=statistics.median(whole) - statistics.median(bare),
        median_of_differences_s=mid, quartiles_s=[low, high],
        empty_request_median_s=statistics.median(empty),
        stages=[line for line in stages.splitlines() if line.startswith("tessera_stage_seconds_s")],
    )  # fmt: skip


def curve(args: argparse.Namespace) -> None:
    """p50, p95, p99 by Poisson arrivals and by users."""
    with served(args.home, config()) as server:
        load = Load(server.url, duration_s=args.duration_s)
        for result in bench(load, concurrencies=[1, 2, 4, 8, 16, 32], rates=[0.5, 1, 2, 3, 4, 6]):
            say(**asdict(result))


def swap(args: argparse.Namespace) -> None:
    """Latencies of users with and without a new champion being loaded among them."""
    tracker, registry = Tracker(args.home), ModelRegistry(args.home)
    with tracker.run("made") as handle:
        first = registry.register(resolve_path(BUNDLE), model_name="swapped", handle=handle)
        second = registry.register(_copy(args.home), model_name="swapped", handle=handle)
    registry.promote("swapped", first, Verdict(True, None, ("the first",)))
    registry.promote("swapped", second, Verdict(True, first, ("the second",)))
    registry.rollback("swapped", "the first is served first")
    with served(
        args.home, split(args.replicas), model="models:/swapped@champion", watch_every_s=1
    ) as server:
        load_on(server.url, 5, 0, args.users)
        for turn in range(args.rounds):
            quiet = load_on(server.url, args.duration_s, 2 * turn, args.users)
            target = second if turn % 2 == 0 else first
            threading.Timer(2.0, registry.rollback, ("swapped", "a swap")).start()
            swapped = load_on(server.url, args.duration_s, 2 * turn + 1, args.users)
            now = json.load(urllib.request.urlopen(f"{server.url}/readyz"))["model_version"]
            assert now == target, f"version {now} is served, not {target}"
            say(
                turn=turn, worst_without_s=quiet.worst, worst_with_s=swapped.worst,
                more_s=(swapped.worst or 0) - (quiet.worst or 0), p50_without_s=quiet.p50,
                p50_with_s=swapped.p50, requests=swapped.requests, errors=swapped.errors,
            )  # fmt: skip


def _copy(home: Path) -> Path:
    """The same bundle, its manifest written another way: a version of its own."""
    copy = home / "copy"
    for file in resolve_path(BUNDLE).rglob("*"):
        if file.is_file():
            target = copy / file.relative_to(resolve_path(BUNDLE))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    manifest = copy / "config.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))
    return copy


@dataclass
class Answers:
    """What clients got: images by seed, failures by status or kind, the longest wait."""

    images: dict[int, bytes]
    failures: dict[str, int]
    worst_s: float = 0.0


async def _users(url: str, users: int, duration_s: float) -> Answers:
    answers, seeds = Answers({}, {}), iter(range(10**6))
    end = time.monotonic() + duration_s
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:

        async def user() -> None:
            while time.monotonic() < end:
                seed, began = next(seeds), time.monotonic()
                body = {"prompt": "a red apple", "seed": seed}
                failure = ""
                try:
                    async with session.post(f"{url}/v1/images/generations", json=body) as answer:
                        content = await answer.json()
                        if answer.status == 200:
                            answers.images[seed] = base64.b64decode(content["data"][0]["b64_json"])
                        else:
                            failure = f"{answer.status} {content['error']['code']}"
                except TimeoutError:
                    failure = "hung"
                except aiohttp.ClientError as error:
                    failure = type(error).__name__
                answers.worst_s = max(answers.worst_s, time.monotonic() - began)
                if failure:
                    answers.failures[failure] = answers.failures.get(failure, 0) + 1
                    await asyncio.sleep(0.05)

        await asyncio.gather(*[user() for _ in range(users)])
    return answers


def replicas() -> list[psutil.Process]:
    """The generator's replicas on this machine."""
    found = psutil.process_iter(["name", "cmdline"])
    return [p for p in found if "Replica" in _title(p) and "generator" in _title(p).lower()]


def _title(process: psutil.Process) -> str:
    return " ".join(process.info["cmdline"] or [process.info["name"] or ""])


def kill(args: argparse.Namespace) -> None:
    """kill -9 of one of two replicas in mid-load; every image is compared with its reference."""
    torch.set_num_threads(CPUS // 2)  # as the replicas: with others, last bits are others
    model = load_generator(BUNDLE, pretrained_cache=args.home / "pretrained", device="cpu")
    with served(args.home, split(2), result_cache_bytes=0) as server:
        mine = {child.pid for child in psutil.Process().children(recursive=True)}
        victims = [process for process in replicas() if process.pid in mine]
        assert len(victims) == 2, victims
        for at in args.kill_at_s:
            threading.Timer(at, lambda: _kill_one(mine)).start()
        answers = asyncio.run(_users(server.url, args.users, args.duration_s))
    wrong = 0
    for seed, image in answers.images.items():
        (expected,) = model.generate([GenerationRequest("a red apple", seed=seed)])
        drawn = np.asarray(Image.open(io.BytesIO(image)))
        wrong += not np.array_equal(drawn, expected.permute(1, 2, 0).numpy())
    say(
        images=len(answers.images), wrong=wrong, failures=answers.failures,
        hung=answers.failures.get("hung", 0), worst_s=answers.worst_s, kills=len(args.kill_at_s),
    )  # fmt: skip


def _kill_one(known: set[int]) -> None:
    victim = next(process for process in replicas() if process.pid in known)
    say(killed=victim.pid)
    os.kill(victim.pid, signal.SIGKILL)


def autoscale(args: argparse.Namespace) -> None:
    """1 to 3 replicas: quiet, load, quiet; replicas and waiting images over time."""
    settings = config(
        max_replicas=3, num_cpus=0.5, target_ongoing_requests=4, max_batch_size=4,
        upscale_delay_s=3, downscale_delay_s=15,
    )  # fmt: skip
    phases = [(15, 1), (args.duration_s, 16), (15, 1)]
    with served(args.home, settings, result_cache_bytes=0) as server:
        seen: list[tuple[float, int, float]] = []
        done, began = threading.Event(), time.monotonic()

        def watch() -> None:
            while not done.wait(0.5):
                states = serve.status().applications[APP_NAME].deployments["generator"]
                seen.append(
                    (time.monotonic() - began, states.replica_states.get("RUNNING", 0),
                     _metric(server.url, "tessera_waiting_pictures"))
                )  # fmt: skip

        watcher = threading.Thread(target=watch)
        watcher.start()
        errors: dict[str, int] = {}
        for seconds, users in phases:
            result = load_on(server.url, seconds, 0, users)
            say(users=users, at_s=time.monotonic() - began, **asdict(result))
            errors |= result.errors
        time.sleep(60)
        done.set()
        watcher.join()
    say(errors=errors, seen=[(round(t, 1), r, w) for t, r, w in seen])
    _plot(seen, args.plot)


def _metric(url: str, name: str) -> float:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return next(float(row.split()[-1]) for row in text.splitlines() if row.startswith(name))


def _plot(seen: list[tuple[float, int, float]], path: Path) -> None:
    import matplotlib.pyplot as plt

    at, running, waiting = zip(*seen, strict=True)
    figure, left = plt.subplots(figsize=(8, 3.5), layout="constrained")
    left.step(at, running, where="post", color="tab:blue")
    left.set(xlabel="seconds", ylim=(0, 4))
    left.set_ylabel("replicas running", color="tab:blue")
    right = left.twinx()
    right.plot(at, waiting, color="tab:orange", linewidth=1)
    right.set_ylabel("images under way", color="tab:orange")
    figure.savefig(path, dpi=90)


def main() -> None:
    commands: dict[str, Callable[[argparse.Namespace], None]] = {
        f.__name__: f for f in (throughput, latency, curve, swap, kill, autoscale)
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--duration-s", type=float, default=20.0, help="of each load")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--kill-at-s", type=float, nargs="*", default=[8.0])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--plot", type=Path, default=Path(__file__).with_name("autoscaling.png"))
    args = parser.parse_args()
    args.home = args.home.absolute()
    args.home.mkdir(parents=True, exist_ok=True)
    commands[args.what](args)


if __name__ == "__main__":
    main()
