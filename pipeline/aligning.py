"""Training the aligner: it is a measuring instrument, so it sees every picture and caption.

Knowing the held-out concepts is what an instrument is for; generators never see it. What is kept
from it is only the validation split, by which its own training stops.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.aligner import AlignerObjective
from pipeline.config import AlignerConfig
from pipeline.encode import captioned_dataset, sample_captions
from pipeline.feed import read_table
from pipeline.train import Training


def build_aligner_training(
    pixels: Path,
    captions: Path,
    config: AlignerConfig,
    *,
    image_size: int,
    caption_width: int,
    max_tokens: int,
) -> Training:
    """What a worker trains: the aligner on the pictures of all splits but validation."""
    styles = sorted(set(read_table(pixels, columns=["style"])["style"].to_pylist()))
    training, validation = (
        captioned_dataset(
            pixels,
            captions,
            split=split,
            styles=styles,
            max_tokens=max_tokens,
            image_size=image_size,
        )
        for split in (("train", "test"), "validation")
    )
    objective = AlignerObjective(config, image_size=image_size, caption_width=caption_width)
    objective.model.standardise_captions(*sample_captions(training))
    return Training(objective, training, validation)
