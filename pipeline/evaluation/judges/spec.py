"""Judges by their names in a recipe, as values that travel to any process and are loaded there.

aligner         the aligner, trained or given                (`aligner` in the recipe)
imagenet        heads over frozen ImageNet features          (`imagenet_judge`)
clip:ID         a pretrained CLIP of that hub id or directory
siglip:ID       a pretrained SigLIP

specs = judge_specs(recipe.evaluate.judges, trained={"aligner": ..., "imagenet": ...},
                    caption_encoder=recipe.caption_encoder, cache=home / "pretrained")
judges = [spec.load(device) for spec in specs]      # in a Ray actor, for example
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pipeline.config import CaptionEncoderConfig
from pipeline.evaluation.judges.judge import Judge
from pipeline.evaluation.judges.trained import AlignerJudge, ImageNetJudge
from pipeline.text.caption_encoder import load_caption_encoder

TRAINED: Mapping[str, type[AlignerJudge] | type[ImageNetJudge]] = {
    judge.name: judge for judge in (AlignerJudge, ImageNetJudge)
}


@dataclass(frozen=True)
class JudgeSpec:
    """Where a judge comes from.

    Attributes:
        setting: its name in `evaluate.judges`.
        path: the directory of one that was trained; None for a pretrained one.
        caption_encoder: what reads captions for a trained one.
        cache: where the caption encoder's weights were converted to.
    """

    setting: str
    path: Path | None
    caption_encoder: CaptionEncoderConfig
    cache: Path

    @property
    def name(self) -> str:
        """The judge's own name, which its metrics begin with: "clip" of "clip:ID"."""
        return self.setting.partition(":")[0]

    def load(self, device: str | torch.device = "cpu") -> Judge:
        """The judge on a device.

        Raises:
            BundleError: the directory holds no such judge, or one of another caption encoder.
            PretrainedNotFoundError: its weights, or the caption encoder's, cannot be found.
        """
        if self.path is None:
            from pipeline.evaluation.judges.hub import load_hub_judge  # transformers: seconds

            return load_hub_judge(self.setting, device=device)
        encoder = load_caption_encoder(self.caption_encoder, cache=self.cache, device=str(device))
        return TRAINED[self.name].load(self.path, encoder=encoder, device=device)


def judge_specs(
    settings: Sequence[str],
    *,
    trained: Mapping[str, Path],
    caption_encoder: CaptionEncoderConfig,
    cache: Path,
) -> list[JudgeSpec]:
    """One spec per name in `evaluate.judges`.

    Args:
        settings: checked, as a recipe holds them.
        trained: the directories of the trained judges among them, "aligner" and "imagenet".
        caption_encoder: the recipe's section.
        cache: where pretrained weights are converted to.
    """
    return [
        JudgeSpec(setting, trained[setting] if setting in TRAINED else None, caption_encoder, cache)
        for setting in settings
    ]
