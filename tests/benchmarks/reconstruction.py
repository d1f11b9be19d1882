"""FSQ and VQ side by side: tokenizers of equal networks, codebooks, steps and images.

    python tests/benchmarks/reconstruction.py --home HOME --shards asset:emoji --steps 400

Each is trained from scratch with the settings of `emoji-base`; with --adversarial-steps it then
goes on from its weights with a patch discriminator beside the perceptual loss. Twemoji and a tenth
of the concepts are kept out of training; reconstructions of held-out concepts, of Noto and of
Twemoji, are evaluated. At least ten steps are needed. Interrupted, the same command goes on.

Prints one JSON line per tokenizer: PSNR (dB), SSIM and KID against the real images, with 95 %
bootstrap intervals; the share of the codebook that all evaluated images use, and its perplexity;
speed and memory of the training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.console import ConsoleReporter
from pipeline.chain.plan import Plan, resolve
from pipeline.chain.table import pixels_of
from pipeline.chain.workflow import opened
from pipeline.config import CaptionEncoderConfig, EvaluateConfig, load_recipe
from pipeline.contracts import ImageTokenizer
from pipeline.evaluation.eval_set import EvalSet
from pipeline.evaluation.features import FeaturesSpec
from pipeline.evaluation.measuring import Instruments, measure_here
from pipeline.evaluation.scores import scores
from pipeline.evaluation.subjects import RealImages, ReconstructedImages
from pipeline.images.pixels import to_float
from pipeline.runtime import ray_runtime
from pipeline.text.caption_encoder import load_caption_encoder
from pipeline.tokenizers._saved import load_tokenizer
from pipeline.tracking.runs import recorded_run
from pipeline.tracking.steps import Results

CODEBOOK = 4_375  # codes: the product of the levels of `emoji-base`
BATCH = 60  # images encoded together


def settings(name: str, args: argparse.Namespace, source: Path | None) -> list[str]:
    """The recipe's overrides to train a tokenizer from scratch, or on from `source`."""
    steps = args.adversarial_steps if source else args.steps
    wanted = [
        f"data.shards=[{args.shards}]",
        "evaluate.styles=[noto,twemoji]",
        f"tokenizer.name={name}",
        f"tokenizer.train.max_steps={steps}",
        "tokenizer.train.time_limit_s=null",
        f"tokenizer.train.validate_every={max(1, steps // 2)}",
        "tokenizer.train.restore=last",
        f"tokenizer.train.batch_size={args.batch_size}",
    ]
    if name == "vq":
        wanted.append(f"tokenizer.codebook_size={CODEBOOK}")
    if source is None:
        return wanted
    return [
        *wanted,
        f"tokenizer.source={source}",
        f"tokenizer.adversarial_weight={args.adversarial_weight}",
        "tokenizer.train.optimizer=adamw",
        "tokenizer.train.learning_rate=3e-4",
    ]


def train(
    name: str, args: argparse.Namespace, source: Path | None
) -> tuple[Plan, Results, dict[str, float]]:
    """The plan, its results, the trained tokenizer among them, and what its training reported."""
    recipe = load_recipe("emoji-base", settings(name, args, source), environment={})
    plan = resolve(recipe, args.home)
    with opened(plan, ConsoleReporter()) as session:
        results = session.run("tokenizer")
        client = session.workspace.tracker.client
        run = client.get_run(recorded_run(results["tokenizer"].path)).data.metrics
    return plan, results, {"memory_gb": run["memory_gb"], "images_per_s": run["images_per_s"]}


def make_instruments(pixels: Path, image_size: int, args: argparse.Namespace) -> Instruments:
    """Those of `tessera evaluate` without judges, for images of two styles."""
    config = EvaluateConfig(num_images=args.pictures, styles=("noto", "twemoji"), languages=("en",))
    return Instruments.prepare(
        EvalSet.from_parquet(pixels, config, image_size=image_size),
        [],
        features=FeaturesSpec(),
        encoder=load_caption_encoder(CaptionEncoderConfig(), cache=args.home / "pretrained"),
        config=config,
    )


def measure(instruments: Instruments, source: Path) -> dict[str, Any]:
    """[value, low, high] of held-out images by metric; and how all images use the codebook."""
    measured = measure_here([RealImages(), ReconstructedImages(source)], instruments)
    found = scores(measured["tokenizer"], measured["real"], bootstrap=1_000, seed=0)
    images = torch.cat([image_set.images for image_set in instruments.eval_set.sets])
    return {
        name: [round(x, 3) for x in (i.value, i.low, i.high)]
        for name, i in found.items()
        if name in ("psnr/unseen", "ssim/unseen", "kid/unseen")
    } | codebook_use(load_tokenizer(source), images)


@torch.inference_mode()
def codebook_use(tokenizer: ImageTokenizer, images: Tensor) -> dict[str, float]:
    """The share of the codebook that uint8 images (N, 3, S, S) use, and its perplexity."""
    batches = torch.split(images, BATCH)
    tokens = torch.cat([tokenizer.encode(to_float(batch)).flatten() for batch in batches])
    share = tokens.bincount(minlength=tokenizer.codebook_size) / len(tokens)
    perplexity = torch.exp(-torch.special.xlogy(share, share).sum())
    return {
        "codes_used": round(float((share > 0).float().mean()), 3),
        "perplexity": round(float(perplexity), 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--shards", default="asset:emoji")
    parser.add_argument("--names", nargs="*", default=["fsq", "vq"])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--adversarial-steps", type=int, default=0)
    parser.add_argument("--adversarial-weight", type=float, default=0.1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=180)
    args = parser.parse_args()
    args.home = args.home.absolute()
    instruments: Instruments | None = None
    with ray_runtime():
        for name in args.names:
            source: Path | None = None
            for phase in ("plain", "adversarial")[: 2 if args.adversarial_steps else 1]:
                plan, results, costs = train(name, args, source)
                source, size = results["tokenizer"].bundle, plan.tokenizer.image_size
                instruments = instruments or make_instruments(pixels_of(results), size, args)
                found = measure(instruments, source)
                print(json.dumps({"tokenizer": name, "phase": phase, **found, **costs}), flush=True)


if __name__ == "__main__":
    main()
