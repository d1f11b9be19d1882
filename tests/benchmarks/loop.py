"""The training loop's overhead: one of its steps against a bare PyTorch step on the same batch.

    python tests/benchmarks/loop.py [--rounds 10] [--batch-size 128] [--width 256] [--depth 6]

Both train the same model in one Ray Train worker on data in memory, in alternating rounds. The
loop's rounds include feeding, averaged metrics and progress messages; the bare ones are forward,
backward, clipping and optimiser step on a batch that is on the device already. On a GPU both are
compiled. Prints JSON: milliseconds per step, and ratios of pairs of rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from pipeline.config import GeneratorConfig, TrainConfig
from pipeline.contracts import ModelSpec
from pipeline.models.networks import masked
from pipeline.progress import start_board
from pipeline.runtime import autocast, compile_modules, environment, ray_runtime
from pipeline.training.loop import Training, _Worker, scaling_for
from pipeline.training.policy import build_optimizers
from pipeline.training.window import Window

SPEC = ModelSpec(
    image_size=64, codebook_size=4_375, num_tokens=64, levels=(7, 5, 5, 5, 5), caption_width=384,
    styles=("noto", "twemoji"),
)  # fmt: skip


class Rows:
    """Random token grids and caption states of the demo's sizes, in memory."""

    weights = None

    def __init__(self, count: int = 2_048) -> None:
        rng = np.random.default_rng(0)
        self.tokens = rng.integers(SPEC.codebook_size, size=(count, 64))
        self.states = rng.standard_normal((count, 24, 384), np.float32).astype(np.float16)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: np.ndarray, draws: np.ndarray | None) -> dict[str, Tensor]:
        return {
            "image_tokens": torch.from_numpy(self.tokens[rows]),
            "caption_states": torch.from_numpy(self.states[rows]),
            "caption_mask": torch.ones(len(rows), 24, dtype=torch.bool),
            "style": torch.zeros(len(rows), dtype=torch.long),
        }


@dataclass(frozen=True)
class Plan:
    """What is compared; a round is `steps` steps."""

    rounds: int
    steps: int
    generator: GeneratorConfig
    train: TrainConfig


def build(config: GeneratorConfig) -> Training:
    rows = Rows()
    return Training(
        masked.MaskedObjective(masked.MaskedTransformer(config, SPEC), config), rows, rows
    )


def compare(plan: Plan, board: Any, out: str) -> None:
    """Runs on the one worker."""
    worker = _Worker(partial(build, plan.generator), plan.train, None, board)
    plain = copy.deepcopy(worker.objective)
    optimizers = build_optimizers(plain.model, plan.train)
    device, window, step = worker.device, Window(), 0
    batch = worker._to_device(worker.training.train.batch(np.arange(plan.train.batch_size), None))
    if worker.compiled:
        compile_modules(plain.compilable())

    def through_the_loop() -> None:
        nonlocal step
        for _ in range(plan.steps):
            window.add(step, *worker._step(step))
            step += 1
            worker.state.step = step
            if window.full:
                window.check()
                worker._log(window, 0.5)
        for batch in worker.fed.values():  # or it would be made during the bare round
            batch.result()

    def bare() -> None:
        plain.train()
        for _ in range(plan.steps):
            with autocast(device):
                loss = plain.losses(batch, "predict")["loss"]
            loss.backward()
            nn.utils.clip_grad_norm_(plain.model.parameters(), plan.train.clip_norm)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    def timed(run: Any) -> float:
        began = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - began) / plan.steps * 1_000

    through_the_loop(), bare()  # warm up
    pairs = []
    for i in range(plan.rounds):
        first, second = (through_the_loop, bare) if i % 2 else (bare, through_the_loop)
        times = {f: timed(f) for f in (first, second)}
        pairs.append((times[through_the_loop], times[bare]))
    ratios = sorted(loop / plain_ms for loop, plain_ms in pairs)
    result = {
        "loop_ms": round(float(np.median([p[0] for p in pairs])), 2),
        "bare_ms": round(float(np.median([p[1] for p in pairs])), 2),
        "ratio_median": round(float(np.median(ratios)), 4),
        "ratio_quartiles": [round(float(q), 4) for q in np.quantile(ratios, [0.25, 0.75])],
        "ratio_range": [round(ratios[0], 4), round(ratios[-1], 4)],
        "rounds": plan.rounds,
        "steps_a_round": plan.steps,
        "batch_size": plan.train.batch_size,
        "optimizer": plan.train.optimizer,
        "ema_decay": plan.train.ema_decay,
        **environment(device),
    }
    Path(out).write_text(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--ema", type=float, default=0.0, help="decay; the bare loop has none")
    args = parser.parse_args()
    plan = Plan(
        args.rounds,
        args.steps,
        GeneratorConfig(width=args.width, depth=args.depth, dropout=0.0, label_smoothing=0.0),
        TrainConfig(
            batch_size=args.batch_size, num_workers=1, optimizer=args.optimizer,
            ema_decay=args.ema, max_steps=1_000_000,
        ),
    )  # fmt: skip
    out = Path.cwd() / ".loop-benchmark.json"
    with ray_runtime():
        board = start_board()
        scaling = scaling_for(1, ray.cluster_resources())
        task = {"plan": plan, "board": board, "out": str(out)}
        trainer = TorchTrainer(
            lambda settings: compare(**settings), train_loop_config=task, scaling_config=scaling
        )
        trainer.fit()
    print(out.read_text())
    out.unlink()


if __name__ == "__main__":
    main()
