"""Training the aligner: it is a measuring instrument, so it sees every picture and caption.

Knowing the held-out concepts is what an instrument is for; generators never see it. What is kept
from it is only the validation split, by which its own training stops.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.aligner import AlignerObjective
from pipeline.checkpoint import best_weights
from pipeline.config import AlignerConfig
from pipeline.datasets import captioned_dataset, sample_captions
from pipeline.encoder_identity import identify
from pipeline.pixel_store import read_table
from pipeline.steps import StepContext
from pipeline.text import HFCaptionEncoder
from pipeline.train import Training, fit


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


def train_aligner(
    context: StepContext,
    pixels: Path,
    captions: Path,
    config: AlignerConfig,
    *,
    image_size: int,
    encoder: HFCaptionEncoder,
) -> dict[str, float]:
    """Train on Ray and leave an aligner's directory, "bundle" in the step's; its last metrics.

    Args:
        pixels, captions: outputs of `preprocess` and `encode_captions`.
        encoder: the one that the captions were read with.

    Raises:
        TesseraError: as `train.fit`.
    """
    build = partial(
        build_aligner_training,
        pixels,
        captions,
        config,
        image_size=image_size,
        caption_width=encoder.width,
        max_tokens=encoder.max_tokens,
    )
    result = fit(
        build,
        config.train,
        storage=context.path,
        name="aligner",
        run=context.run,
        on_progress=context.on_progress,
    )
    model = build().objective.model
    model.load_state_dict(best_weights(result.checkpoint))
    model.save(context.path / "bundle", identify(encoder))
    return result.metrics
