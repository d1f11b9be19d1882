"""What each judge makes of real images, and of the same images made worse: the table of its card.

    python tests/benchmarks/judges.py --home HOME --pixels HOME/steps/preprocess-KEY/data/pixels \\
        --judges aligner=asset:aligner imagenet=HOME/steps/imagenet_judge-KEY/bundle

Of one style's seen and unseen images (as `tessera evaluate` chooses them), among as many captions:
Recall@1 and alignment, the cosine of image and own caption. Degraded images are compared with the
real ones they were made of, pair by pair; intervals are 95 %, bootstrapped over images. A judge
that sees as people do gives every degraded image less, beyond chance.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from pipeline.artifacts import resolve_path
from pipeline.config import CaptionEncoderConfig, EvaluateConfig
from pipeline.contracts import Interval
from pipeline.evaluation.eval_set import EvalSet, ImageSet
from pipeline.evaluation.judges import Judge, judge_specs
from pipeline.evaluation.samples import reconstruct
from pipeline.images.degrade import add_noise, blur, wash_out
from pipeline.images.pixels import to_float, to_uint8
from pipeline.metrics import alignment, mean_interval, paired_gain, recall_at_k
from pipeline.runtime import choose_device
from pipeline.tokenizers._saved import load_tokenizer, resolve_tokenizer

BATCH = 50
RESAMPLING = {"bootstrap": 2_000, "seed": 0}


def subjects(images: Tensor, tokenizer: str) -> dict[str, Tensor]:
    """uint8 (N, 3, S, S) by what was done to them; strengths are those of an image of 64 pixels."""
    floats, pixel = to_float(images), images.shape[-1] / 64
    torch.manual_seed(0)
    return {
        "real": images,
        "reconstructions by the base's tokenizer": reconstruct(
            load_tokenizer(resolve_tokenizer(tokenizer)), images, BATCH
        ),
        "blurred, sigma 1 px": to_uint8(blur(floats, 1.0 * pixel)),
        "blurred, sigma 2 px": to_uint8(blur(floats, 2.0 * pixel)),
        "noise, sd 0.1": to_uint8(add_noise(floats, 0.1)),
        "washed out, contrast 0.5": to_uint8(wash_out(floats, 0.5)),
    }


def measure(judge: Judge, image_set: ImageSet, made: Mapping[str, Tensor]) -> list[str]:
    """Rows of a Markdown table: subject, R@1, alignment, and what both lose against real."""
    language = next(iter(image_set.captions))
    captions = judge.embed_captions(image_set.captions[language])
    found = {name: judge.embed_images(images) for name, images in made.items()}
    count = len(image_set)
    wrong = torch.cat([captions[:count].roll(1, 0), captions[count:]])
    rows = []
    for name, embedded in found.items():
        values = [
            metric(embedded, captions) for metric in (lambda e, c: recall_at_k(e, c, 1), alignment)
        ]
        real = [recall_at_k(found["real"], captions, 1), alignment(found["real"], captions)]
        lost = [
            "" if name == "real" else cell(paired_gain(after, before, **RESAMPLING))
            for before, after in zip(real, values, strict=True)
        ]
        levels = [cell(mean_interval(value, **RESAMPLING)) for value in values]
        rows.append(f"| {name} | {levels[0]} | {lost[0]} | {levels[1]} | {lost[1]} |")
    others = [other for other in image_set.captions if other != language]
    for label, texts in [("real, shuffled captions", wrong)] + [
        (f"real, captions in {other}", judge.embed_captions(image_set.captions[other]))
        for other in others
    ]:
        values = [recall_at_k(found["real"], texts, 1), alignment(found["real"], texts)]
        levels = [cell(mean_interval(value, **RESAMPLING)) for value in values]
        rows.append(f"| {label} | {levels[0]} | | {levels[1]} | |")
    return rows


def cell(item: Interval) -> str:
    return f"{item.value:.3f} [{item.low:.3f}, {item.high:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--pixels", type=Path, required=True)
    parser.add_argument("--judges", nargs="+", required=True, metavar="NAME=DIRECTORY")
    parser.add_argument("--style", default="noto")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--tokenizer", default="asset:base")
    args = parser.parse_args()
    config = EvaluateConfig(num_images=args.images, styles=(args.style,))
    eval_set = EvalSet.from_parquet(args.pixels, config, image_size=args.image_size)
    trained = {
        name: resolve_path(directory)
        for name, _, directory in (given.partition("=") for given in args.judges)
    }
    specs = judge_specs(
        list(trained),
        trained=trained,
        caption_encoder=CaptionEncoderConfig(),
        cache=args.home / "pretrained",
    )
    made = [subjects(image_set.images, args.tokenizer) for image_set in eval_set.sets]
    for spec in specs:
        judge = spec.load(choose_device())
        for image_set, images in zip(eval_set.sets, made, strict=True):
            print(f"\n{spec.name}: {len(image_set)} {image_set.name} {image_set.style} images\n")
            print("| images | R@1 | lost | alignment | lost |\n|---|---|---|---|---|")
            print("\n".join(measure(judge, image_set, images)))


if __name__ == "__main__":
    main()
