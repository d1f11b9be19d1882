"""The aligner's training: `tessera align RECIPE`.

The aligner is a measuring instrument, so it trains on the training and the test split: it has to
know the held-out concepts by which generators are evaluated, and generators never see it. Only the
validation split is kept from it, by which its own training stops.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from pipeline.config import AlignerConfig
from pipeline.data.preprocess.store import read_table
from pipeline.evaluation.aligner import Aligner, AlignerObjective, aligner_shape_of_source
from pipeline.text.caption_encoder import HFCaptionEncoder
from pipeline.text.encoder_identity import identify
from pipeline.tracking.steps import StepContext
from pipeline.training.checkpoint import best_weights
from pipeline.training.datasets import captioned_dataset, sample_captions
from pipeline.training.loop import Training, fit


def build_aligner_training(
    pixels: Path,
    captions: Path,
    config: AlignerConfig,
    *,
    image_size: int,
    caption_width: int,
    max_tokens: int,
    source: Path | None = None,
) -> Training:
    """What every worker of the training builds: the objective and its data sets.

    Args:
        config: of the source's shape.
        source: the directory of an aligner from whose weights training goes on.
    """
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
    if source is None:
        objective.model.standardise_captions(*sample_captions(training))
    else:
        objective.model.load_state_dict(Aligner.load(source).state_dict())
    return Training(objective, training, validation)


def train_aligner(
    context: StepContext,
    pixels: Path,
    captions: Path,
    config: AlignerConfig,
    *,
    image_size: int,
    encoder: HFCaptionEncoder,
    source: Path | None = None,
) -> dict[str, float]:
    """Train an aligner on Ray and save it as "bundle" in the step's directory.

    Args:
        pixels, captions: outputs of `preprocess` and `encode_captions`.
        image_size: pixels per side of the preprocessed images.
        encoder: the one that the captions were read with.
        source: the directory of an aligner from whose weights training goes on; None: from scratch.

    Returns:
        The metrics of the checkpoint that it is made of.

    Raises:
        TesseraError: as `loop.fit`; or the source cannot be read, or is of another shape than the
            section sets.
    """
    config = aligner_shape_of_source(config, None if source is None else Aligner.load(source))
    build = partial(
        build_aligner_training,
        pixels,
        captions,
        config,
        image_size=image_size,
        caption_width=encoder.width,
        max_tokens=encoder.max_tokens,
        source=source,
    )
    result = fit(
        build,
        config.train,
        storage=context.path,
        name="aligner",
        run=context.run,
        on_progress=context.on_progress,
    )
    aligner = Aligner(config, image_size=image_size, caption_width=encoder.width)
    aligner.load_state_dict(best_weights(result.checkpoint))
    aligner.save(context.path / "bundle", identify(encoder))
    return result.metrics
