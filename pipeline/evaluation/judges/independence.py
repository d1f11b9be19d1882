"""Nothing is judged through features that it was trained on: such a judge is refused.

A tokenizer's manifest records the pretrained image features that its losses looked through
(`TokenizerManifest.pretrained_features`), a bundle's those of its generator beside its caption
encoder. Those written before there was a record are read by the settings that they carry.

    remark = check_independent(judge, bundle)        # a Judge or Features; RecipeError if refused
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipeline.bundles.bundle import BundleManifest
from pipeline.errors import RecipeError
from pipeline.evaluation.features import Features, FeaturesIdentity
from pipeline.evaluation.judges.judge import Judge
from pipeline.tokenizers._saved import TokenizerManifest, read_manifest


def check_independent(instrument: Judge | Features, directory: Path) -> str:
    """Make sure that a judge, or features, see through nothing that a model was trained on.

    Args:
        instrument: what shall evaluate.
        directory: a bundle's or a tokenizer's.

    Returns:
        What a report should say: which features the training used where the manifest did not
        record it; "" where it did.

    Raises:
        RecipeError: the model was trained on the same weights; both are named.
        BundleError: there is no bundle or tokenizer that this version reads.
    """
    seen_through, setting = _seen_through(instrument)
    used = list(trained_on(directory))
    for part, features in used:
        if seen_through is not None and seen_through.is_same(features):
            raise RecipeError(
                f"{setting} sees images through {seen_through}, and {part} of {directory} was "
                f"trained on {features}: what a model was trained on cannot judge it. Choose "
                f"another in {setting.partition(':')[0].partition('=')[0]}"
            )
    if _is_recorded(directory):
        return ""
    names = ", ".join(features.name for _, features in used) or "none"
    return (
        f"{directory} does not record which pretrained features it was trained on; by its settings "
        f"they are: {names}"
    )


def trained_on(directory: Path) -> Iterator[tuple[str, FeaturesIdentity]]:
    """The pretrained weights that a bundle's or a tokenizer's training used, each with the part
    that used them. The digest is "" where only a name is known.

    Raises:
        BundleError: there is neither.
    """
    for name, digest in _tokenizer(directory).trained_on.items():
        yield "the tokenizer", FeaturesIdentity(name, digest)
    if (directory / "tokenizer").is_dir():
        manifest = read_manifest(directory, BundleManifest)
        for name, digest in manifest.pretrained_features.items():
            yield "the generator", FeaturesIdentity(name, digest)
        # A dual encoder's captions are half of what it judges by.
        yield "the generator", FeaturesIdentity(manifest.encoder.id, manifest.encoder.digest)


def _tokenizer(directory: Path) -> TokenizerManifest:
    inner = directory / "tokenizer"
    return read_manifest(inner if inner.is_dir() else directory, TokenizerManifest)


def _is_recorded(directory: Path) -> bool:
    return _tokenizer(directory).pretrained_features is not None


def _seen_through(instrument: Judge | Features) -> tuple[FeaturesIdentity | None, str]:
    """The weights, and the setting that chose the instrument."""
    if isinstance(instrument, Judge):
        return instrument.trained_on, f"evaluate.judges: {instrument.name}"
    return instrument.identity, f"evaluate.features={instrument.identity.name}"
