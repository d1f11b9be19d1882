"""Drawing speed of the generator families side by side, and the effect of more decoding steps.

    python tests/benchmarks/families.py speed --cache HOME/pretrained
    python tests/benchmarks/families.py backends --cache HOME/pretrained
    python tests/benchmarks/families.py steps BUNDLE --cache HOME/pretrained --pixels DIR

`speed` draws batches of images with networks of the recipes' sizes (their weights do not matter to
the speed) and the shipped base's tokenizer, captions encoded beforehand; rounds of all families
alternate. `decode_share` is the tokenizer's part of the time.

`backends` draws the same batches by the optimised and by the plain implementation of each family
(TESSERA_DECODING=auto and reference, pipeline/models/decoding/backend.py), in alternating rounds.
`ratio` is the plain one's time over the optimised one's, the median and the range of the rounds.

`steps` evaluates a masked BUNDLE as `tessera evaluate` does, with several numbers of decoding
steps, on the images that a run preprocessed (DIR is HOME/steps/preprocess-*/data/pixels).

All print JSON lines.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.artifacts import ASSETS, resolve_path
from pipeline.bundles.bundle import load_bundle, load_generator
from pipeline.config import CaptionEncoderConfig, EvaluateConfig, load_recipe
from pipeline.contracts import GenerationRequest, ModelParts
from pipeline.evaluation.aligner import Aligner
from pipeline.evaluation.eval_set import EvalSet
from pipeline.evaluation.features import ImageNetFeatures
from pipeline.evaluation.samples import generate_images, requests_for
from pipeline.metrics import kid_interval, mean_interval, recall_at_k
from pipeline.models import load_family
from pipeline.models.decoding.backend import VARIABLE
from pipeline.runtime import choose_device
from pipeline.text.caption_encoder import load_caption_encoder
from pipeline.tokenizers._saved import load_tokenizer

CONTENDERS = {
    "masked, 8 steps": ("emoji-demo", 8),
    "masked, 12 steps": ("emoji-demo", 12),
    "causal": ("emoji-causal", None),
    "gan": ("emoji-gan", None),
}


class Clock:
    """Seconds spent in a method that it wraps."""

    def __init__(self, owner: Any, name: str) -> None:
        self.seconds, self._call = 0.0, getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *arguments: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._call(*arguments)
        finally:
            if choose_device().type == "cuda":
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - began


def build(recipe_name: str, cache: Path) -> tuple[Any, Clock]:
    base = load_bundle("asset:base")
    config = load_recipe(recipe_name, environment={}).generator
    family, spec = load_family(config.family), base.manifest.model_spec
    reader = family.caption_tokenizer(config, None)
    spec = replace(spec, language_model=family.language_model_config(config, None))
    encoder = load_caption_encoder(CaptionEncoderConfig(), cache=cache)
    tokenizer = load_tokenizer(resolve_path("asset:base") / "tokenizer")
    parts = ModelParts(tokenizer.to(choose_device()), encoder, choose_device(), reader)
    torch.manual_seed(0)
    return family.generator(family.build(config, spec), config, spec, parts), Clock(
        tokenizer, "decode"
    )


def requests_of(count: int, num_steps: int | None) -> list[GenerationRequest]:
    return [
        GenerationRequest(f"a red apple, {i}", seed=i, num_steps=num_steps) for i in range(count)
    ]


def speed(args: argparse.Namespace) -> None:
    made = {
        name: (*build(recipe, args.cache), steps) for name, (recipe, steps) in CONTENDERS.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    shares: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(args.rounds + 1):
        for name, (generator, clock, steps) in made.items():
            requests = requests_of(args.batch_size, steps)
            clock.seconds, began = 0.0, time.perf_counter()
            generator.generate(requests)
            took = time.perf_counter() - began
            if turn:  # the first reads captions and warms up
                seconds[name].append(took)
                shares[name].append(clock.seconds / took)
    for name, found in seconds.items():
        parameters = sum(p.numel() for p in made[name][0].model.parameters())
        rates = sorted(args.batch_size / s for s in found)
        print(json.dumps({
            "family": name, "parameters_m": round(parameters / 1e6, 1),
            "images_per_s": round(statistics.median(rates), 2),
            "range": [round(rates[0], 2), round(rates[-1], 2)],
            "decode_share": round(statistics.median(shares[name]), 3),
        }), flush=True)  # fmt: skip


def backends(args: argparse.Namespace) -> None:
    for name, (recipe, num_steps) in CONTENDERS.items():
        made = {value: build(recipe, args.cache)[0] for value in ("reference", "auto")}
        for batch_size in args.batch_sizes:
            requests = requests_of(batch_size, num_steps)
            pairs = []
            for turn in range(args.rounds + 1):
                seconds = {}
                for value in ("reference", "auto") if turn % 2 else ("auto", "reference"):
                    os.environ[VARIABLE] = value
                    began = time.perf_counter()
                    made[value].generate(requests)
                    seconds[value] = time.perf_counter() - began
                if turn:  # the first reads captions, packs weights and warms up
                    pairs.append((seconds["reference"], seconds["auto"]))
            ratios = sorted(reference / auto for reference, auto in pairs)
            reference, auto = (statistics.median(s) / batch_size for s in zip(*pairs, strict=True))
            print(json.dumps({
                "family": name, "batch": batch_size, "threads": torch.get_num_threads(),
                "reference_s_per_image": round(reference, 4), "auto_s_per_image": round(auto, 4),
                "ratio": round(statistics.median(ratios), 3),
                "range": [round(ratios[0], 3), round(ratios[-1], 3)],
            }), flush=True)  # fmt: skip


def steps(args: argparse.Namespace) -> None:
    config = EvaluateConfig(num_images=args.pictures, styles=("noto",), languages=("en",))
    eval_set = EvalSet.from_parquet(args.pixels, config, image_size=64)
    encoder = load_caption_encoder(CaptionEncoderConfig(), cache=args.cache)
    aligner = Aligner.load(ASSETS / "aligner", device=choose_device())
    features = ImageNetFeatures(device=choose_device())
    generator = load_generator(args.bundle, pretrained_cache=args.cache)
    real = torch.cat([features(pictures.images) for pictures in eval_set.sets])
    for num_steps in args.steps:
        drawn, hits, took = [], {}, []
        for pictures in eval_set.sets:
            requests = requests_for(pictures, "en", generator.styles, seed=0)
            requests = [replace(request, num_steps=num_steps) for request in requests]
            images, seconds = generate_images(generator, requests, config.batch_size)
            captions = aligner.embed_captions(*encoder.encode(pictures.captions["en"]))
            hits[pictures.name] = recall_at_k(aligner.embed_images(images), captions, k=1)
            drawn.append(features(images))
            took += seconds
        kid = kid_interval(real, torch.cat(drawn), bootstrap=1_000, seed=0)
        shown = {
            name: [round(v, 3) for v in (i.value, i.low, i.high)]
            for name, i in {
                "kid": kid,
                **{
                    f"retrieval_{name}": mean_interval(found, bootstrap=1_000, seed=0)
                    for name, found in hits.items()
                },
            }.items()
        }
        pace = round(statistics.mean(took), 3)
        print(json.dumps({"num_steps": num_steps, "seconds_a_picture": pace, **shown}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("speed")
    first.set_defaults(run=speed)
    first.add_argument("--rounds", type=int, default=5)
    first.add_argument("--batch-size", type=int, default=16)
    both = commands.add_parser("backends")
    both.set_defaults(run=backends)
    both.add_argument("--rounds", type=int, default=5)
    both.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8])
    second = commands.add_parser("steps")
    second.set_defaults(run=steps)
    second.add_argument("bundle")
    second.add_argument("--pixels", type=Path, required=True)
    second.add_argument("--pictures", type=int, default=128)
    second.add_argument("--steps", type=int, nargs="*", default=[2, 4, 6, 8, 12, 16, 24])
    for command in (first, both, second):
        command.add_argument("--cache", type=Path, default=Path(".tessera/pretrained"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
