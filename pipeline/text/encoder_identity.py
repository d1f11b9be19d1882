"""The caption encoder known without loading it: its width, and whether it is a bundle's own.

A bundle does not carry the frozen language model that reads its captions. It carries an
`EncoderIdentity`, a digest of the weights and what they make of a few captions, which is compared
when the two meet. Comparing needs the encoder to be loaded once; its identity is then remembered in
the cache for as long as its files stay the same.

    found = identity_of(recipe.caption_encoder, cache=home / "pretrained")
    check_identity(read_bundle(base).encoder, found)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import __version__
from pipeline.artifacts import remembered
from pipeline.config import CaptionEncoderConfig
from pipeline.errors import BundleError, RecipeError
from pipeline.text.pretrained import files_of, find_language_model, hub_snapshot, not_found

if TYPE_CHECKING:
    from pipeline.text.caption_encoder import HFCaptionEncoder

logger = logging.getLogger(__name__)

PROBES = (
    "a red apple", "two dogs running on a beach at sunset", "flag: Switzerland",
    "一个红苹果", "一幅描绘夏日海滩的画作", "消防车",
)  # fmt: skip
MIN_PROBE_COSINE = 0.975
"""Weights rounded to 4 bits once more move the probes to 0.985, another prefix to 0.942 - 0.959."""
LIBRARIES = ("torch", "transformers", "tokenizers")
"""What an encoder's states depend on beside its files and settings."""


@dataclass(frozen=True)
class EncoderIdentity:
    """What a bundle remembers of the caption encoder that it was trained with.

    Attributes:
        id: the model's hub id or path.
        digest: sha256 of its weights.
        probes: `embed` of PROBES, in order.
    """

    id: str
    digest: str
    probes: tuple[tuple[float, ...], ...]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderIdentity:
        """The inverse of `dataclasses.asdict`, also after a journey through JSON."""
        return cls(values["id"], values["digest"], tuple(map(tuple, values["probes"])))

    @property
    def width(self) -> int:
        """Channels of a state."""
        return len(self.probes[0])

    def __str__(self) -> str:
        return f"{self.id!r} (weights {self.digest[:12]})"


def identify(encoder: HFCaptionEncoder) -> EncoderIdentity:
    """What to store so that `check_encoder` recognises this encoder."""
    return EncoderIdentity(encoder.id, encoder.digest, fingerprint(encoder))


def fingerprint(encoder: HFCaptionEncoder) -> tuple[tuple[float, ...], ...]:
    """`embed` of PROBES, rounded to what matters: sensitive to weights, prefix and tokenizer."""
    return tuple(tuple(round(x, 4) for x in row) for row in encoder.embed(PROBES).tolist())


def check_encoder(expected: EncoderIdentity, encoder: HFCaptionEncoder) -> None:
    """`check_identity` with an encoder that is loaded.

    Raises:
        BundleError: the encoder reads captions differently.
    """
    check_identity(expected, identify(encoder))


def check_identity(
    expected: EncoderIdentity,
    found: EncoderIdentity,
    settings: CaptionEncoderConfig | None = None,
) -> None:
    """Make sure that a bundle meets the caption encoder it was trained with.

    Other weights whose probes agree (full precision instead of 4 bits) pass with a warning; the
    same weights behind another prefix or tokenizer, or with captions cut earlier, do not.

    Args:
        settings: that the bundle was trained with, for the message, where they are known.

    Raises:
        BundleError: the encoder reads captions differently.
    """
    wanted = f"caption encoder {expected}"
    if expected.width != found.width:
        raise BundleError(
            f"the bundle wants {wanted}, {expected.width} wide; {found} is {found.width} wide"
        )
    cosine = min(map(_cosine, expected.probes, found.probes))
    if cosine < MIN_PROBE_COSINE:
        raise BundleError(
            f"the bundle wants {wanted}; {found} reads captions differently (cosine {cosine:.3f}, "
            f"at least {MIN_PROBE_COSINE} is needed). {_remedy(expected, settings)}"
        )
    if found.digest != expected.digest:
        logger.warning("%s stands in for %s; their probes agree to %.4f", found, wanted, cosine)


def _remedy(expected: EncoderIdentity, settings: CaptionEncoderConfig | None) -> str:
    if settings is None:
        return (
            f"Set caption_encoder.model to {expected.id!r}, and its prefix and max_tokens to those "
            "it was trained with"
        )
    known = settings.model_dump()
    stated = ", ".join(f"caption_encoder.{name}={value!r}" for name, value in known.items())
    return f"Set what it was trained with: {stated}"


def _cosine(a: Sequence[float], b: Sequence[float]) -> float:
    product: float = sum(map(mul, a, b))
    return product / (math.hypot(*a) * math.hypot(*b))


# ---- Without loading it --------------------------------------------------------------------------


def identity_of(config: CaptionEncoderConfig, *, cache: Path) -> EncoderIdentity:
    """The identity of the encoder that `config` names; loads it if that is not remembered.

    Args:
        cache: where a package's weights are converted to, and where identities are remembered.

    Raises:
        PretrainedNotFoundError: it is nowhere to be found; the message says how to get it.
    """

    def load() -> dict[str, Any]:
        from pipeline.text.caption_encoder import load_caption_encoder

        return asdict(identify(load_caption_encoder(config, cache=cache)))

    versions = {"tessera": __version__} | {name: metadata.version(name) for name in LIBRARIES}
    found = remembered(
        "identity", _files(config, cache), load,
        folder=cache, settings=[config.model_dump(mode="json"), list(PROBES), versions],
    )  # fmt: skip
    return EncoderIdentity.from_dict(found)


def encoder_width(config: CaptionEncoderConfig, *, cache: Path) -> int:
    """Channels of a state of the encoder that `config` names, which is looked for but not loaded.

    Args:
        cache: where a package's weights are converted to, and where widths are remembered.

    Raises:
        PretrainedNotFoundError: it is nowhere to be found; the message says how to get it.
        RecipeError: it cannot read as many tokens as `config` says.
    """
    read = partial(_read_shape, config, find_language_model(config.model, cache=cache))
    width, positions = remembered("shape", _files(config, cache), read, folder=cache)
    if positions is not None and config.max_tokens > positions:
        raise RecipeError(
            f"caption_encoder.max_tokens={config.max_tokens}: {config.model} reads {positions} "
            "tokens at most; lower it"
        )
    return int(width)


def _read_shape(config: CaptionEncoderConfig, source: str) -> tuple[int, int | None]:
    """Channels of a state, and the longest text in tokens where the model has such a limit."""
    from transformers import AutoConfig

    try:
        found = AutoConfig.from_pretrained(source)
        return found.hidden_size, getattr(found, "max_position_embeddings", None)
    except (OSError, ValueError) as error:
        raise not_found(source, config.model, error) from error


def _files(config: CaptionEncoderConfig, cache: Path) -> list[Path]:
    """The encoder's files on this machine: if they are the same, so is the encoder."""
    source = Path(find_language_model(config.model, cache=cache))
    return files_of(source if source.is_dir() else hub_snapshot(config.model))
