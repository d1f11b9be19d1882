"""Serves a bundle without Tessera's service: what serving.py compares the service with.

    python tests/benchmarks/peers.py fastapi BUNDLE --pretrained DIR --threads 2 --port 9001
    python tests/benchmarks/peers.py litserve BUNDLE ...       (pip install litserve)
    python tests/benchmarks/peers.py offline BUNDLE ...        no server: reads lines from stdin,
                                                               "draw SECONDS" or "one SEED"

Both servers take {"prompt", "seed"} at /v1/images/generations and answer {"b64_json"}: a PNG
without metadata. They check nothing and bound no queue. They form batches as the service does: up
to --batch-size images, waiting --batch-wait-s for others to join.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pipeline.bundles.bundle import load_generator
from pipeline.contracts import GenerationRequest, ImageGenerator

PATH = "/v1/images/generations"


def png(image: Tensor) -> str:
    """uint8 (3, H, W) -> base64 of a PNG."""
    stream = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(stream, format="PNG")
    return base64.b64encode(stream.getvalue()).decode()


def load(args: argparse.Namespace) -> ImageGenerator:
    torch.set_num_threads(args.threads)
    model = load_generator(args.bundle, pretrained_cache=args.pretrained, device="cpu")
    model.generate([GenerationRequest("a red apple")])
    return model


def offline(args: argparse.Namespace) -> None:
    """Batches of distinct seeds, one after the other, as fast as the model goes."""
    model, seed = load(args), 0
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        what, value = line.split()
        began = time.perf_counter()
        if what == "one":
            model.generate([GenerationRequest("a red apple", seed=int(value))])
            drawn = 1
        else:
            drawn = 0
            while time.perf_counter() - began < float(value):
                size = args.batch_size
                model.generate(
                    [GenerationRequest("a red apple", seed=seed + i) for i in range(size)]
                )
                seed, drawn = seed + size, drawn + size
        answer = {"images": drawn, "seconds": time.perf_counter() - began}
        print(json.dumps(answer), flush=True)


def fastapi(args: argparse.Namespace) -> None:
    """FastAPI and uvicorn, a queue, and the model in a thread."""
    import uvicorn
    from fastapi import FastAPI

    model, line = load(args), asyncio.Queue[tuple[GenerationRequest, asyncio.Future[str]]]()

    async def work() -> None:
        while True:
            batch, end = [await line.get()], time.monotonic() + args.batch_wait_s
            while len(batch) < args.batch_size and (left := end - time.monotonic()) > 0:
                try:
                    batch.append(await asyncio.wait_for(line.get(), left))
                except TimeoutError:
                    break
            images = await asyncio.to_thread(model.generate, [request for request, _ in batch])
            for (_, answer), image in zip(batch, images, strict=True):
                answer.set_result(png(image))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> Any:
        worker = asyncio.create_task(work())
        yield
        worker.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post(PATH)
    async def draw(body: dict[str, Any]) -> dict[str, str]:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        await line.put((GenerationRequest(body["prompt"], seed=body["seed"]), answer))
        return {"b64_json": await answer}

    uvicorn.run(app, port=args.port, log_level="warning")


def litserve(args: argparse.Namespace) -> None:
    """LitServe with its own batching."""
    from litserve import LitServer
    from litserve_api import Api

    server = LitServer(Api(args), accelerator="cpu", workers_per_device=args.workers, timeout=120)
    server.run(
        host="127.0.0.1", port=args.port, log_level="warning", generate_client_file=False
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("offline", "fastapi", "litserve"))
    parser.add_argument("bundle")
    parser.add_argument("--pretrained", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=1, help="processes, of litserve alone")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--port", type=int, default=9001)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batch-wait-s", type=float, default=0.02)
    args = parser.parse_args()
    {"offline": offline, "fastapi": fastapi, "litserve": litserve}[args.what](args)


if __name__ == "__main__":
    main()
