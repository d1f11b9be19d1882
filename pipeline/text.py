"""The caption encoder: a frozen pretrained language model that reads captions.

Any model that `transformers.AutoModel` loads will do: BERT types, GPT types, T5's encoder. Bundles
do not carry it; they carry an `EncoderIdentity` that `check_encoder` compares at load.

    encoder = load_caption_encoder(recipe.caption_encoder, cache=home / "pretrained")
    states, mask = encoder.encode(["a red apple", "一个红苹果"])  # (2, L, 384), (2, L)
"""

from __future__ import annotations

import functools
import hashlib
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers  # its names load when they are used: a training on cached states needs none
from torch import Tensor, nn
from transformers.utils import logging as hf_logging

from pipeline.config import CaptionEncoderConfig
from pipeline.errors import BundleError, PretrainedNotFoundError
from pipeline.pretrained import find_language_model, how_to_get
from pipeline.runtime import autocast

logger = logging.getLogger(__name__)

PROBES = (
    "a red apple", "two dogs running on a beach at sunset", "flag: Switzerland",
    "一个红苹果", "一幅描绘夏日海滩的画作", "消防车",
)  # fmt: skip
# One more rounding to 4 bits moves the probes to 0.985, another prefix to 0.942 - 0.959.
MIN_PROBE_COSINE = 0.975
_LOADING = threading.Lock()


class HFCaptionEncoder:
    """`contracts.CaptionEncoder` over a Hugging Face model.

    Attributes:
        id: the hub id or path it was asked for by.
        width: channels of a state.
        max_tokens: longer captions are cut.
        digest: sha256 of the weights, whatever file format they came in.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        config: CaptionEncoderConfig,
        batch_size: int = 64,
    ) -> None:
        self.id = config.model
        self.max_tokens = config.max_tokens
        self.prefix = config.prefix
        self.batch_size = batch_size
        self.width: int = model.config.hidden_size
        self.digest = _digest(model)
        self.device = model.device
        self._model = _for_inference(model)
        self._tokenizer = tokenizer
        self._lock = threading.Lock()  # tokenizers remember how the last call wanted to cut

    @torch.inference_mode()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Read captions, sorted by length inside so that little padding is computed.

        Returns:
            states float32 (B, L, width), zero where there is no token, and mask bool (B, L), on
            the CPU; L is the longest caption's number of tokens, at most `max_tokens`.
        """
        if not captions:
            return torch.zeros(0, 0, self.width), torch.zeros(0, 0, dtype=torch.bool)
        texts = [self.prefix + caption for caption in captions]
        with self._lock:
            found = self._tokenizer(texts, truncation=True, max_length=self.max_tokens)
        tokens = found["input_ids"]
        lengths = torch.tensor([len(ids) for ids in tokens], dtype=torch.int64)
        longest = int(lengths.max())
        states = torch.zeros(len(texts), longest, self.width)
        for rows in lengths.argsort(stable=True).split(self.batch_size):
            states[rows, : int(lengths[rows].max())] = self._forward([tokens[i] for i in rows])
        return states, torch.arange(longest) < lengths[:, None]

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Mean of the states, l2-normalised: float32 (B, width)."""
        return F.normalize(masked_mean(*self.encode(captions)), dim=-1)

    def _forward(self, tokens: Sequence[Sequence[int]]) -> Tensor:
        """Token ids of B captions -> float32 (B, L, width), zero at the padding."""
        padded = {"input_ids": tokens}
        with self._lock:
            batch = self._tokenizer.pad(padded, padding_side="right", return_tensors="pt")
        mask = batch["attention_mask"].to(self.device)
        with autocast(self.device):
            output = self._model(input_ids=batch["input_ids"].to(self.device), attention_mask=mask)
        return (output.last_hidden_state.float() * mask[..., None]).cpu()


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of every caption: (B, L, C), bool (B, L) -> (B, C)."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


@torch.no_grad()
def standardise(norm: nn.LayerNorm, features: Tensor) -> None:
    """Set a LayerNorm's weight and bias so that these features leave it with mean 0, variance 1.

    A language model's states lie in a narrow cone (any two captions of e5 have a cosine above
    0.7); a fresh network sees hardly any difference between captions and idles until it has found
    one.

    Args:
        features: (rows, channels), hundreds of rows; a single one changes nothing.
    """
    if len(features) < 2:
        return
    deviation, mean = torch.std_mean(norm(features), dim=0)
    norm.weight.div_(deviation + 1e-3)
    norm.bias.sub_(mean).div_(deviation + 1e-3)


def load_caption_encoder(
    config: CaptionEncoderConfig, *, cache: Path, device: str | torch.device = "cpu"
) -> HFCaptionEncoder:
    """The language model `config` names, from disk, an installed package or the hub.

    It never changes, so a process loads it once and all who ask for it share it, from any thread.

    Args:
        cache: where a package's weights are converted to, once.

    Raises:
        PretrainedNotFoundError: it is nowhere to be found; the message says how to get it.
    """
    source = find_language_model(config.model, cache=cache)
    files = sorted(Path(source).iterdir()) if Path(source).is_dir() else []
    stamps = tuple((file.name, file.stat().st_mtime_ns) for file in files)
    with _LOADING:
        return _loaded(config, source, str(device), stamps)


@functools.lru_cache(maxsize=2)
def _loaded(
    config: CaptionEncoderConfig, source: str, device: str, stamps: tuple[tuple[str, int], ...]
) -> HFCaptionEncoder:
    """`stamps` tell files in the same place from others."""
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            stored = (
                getattr(transformers.AutoConfig.from_pretrained(source), "dtype", None)
                or torch.float32
            )
            # transformers makes the dtype it loads in the whole process' default meanwhile, and
            # other threads may be drawing: float32 is what they count on
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _not_found(source, config, error) from error
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        model = model.encoder  # T5 and its kin
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.get_input_embeddings().to(stored)  # 250,000 words are most of a small model
    return HFCaptionEncoder(model.to(device), tokenizer, config)


def check_available(config: CaptionEncoderConfig, *, cache: Path) -> None:
    """Look for the language model without loading it.

    Raises:
        PretrainedNotFoundError: it is nowhere to be found; the message says how to get it.
    """
    source = find_language_model(config.model, cache=cache)
    try:
        transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _not_found(source, config, error) from error


def _not_found(
    source: str, config: CaptionEncoderConfig, error: Exception
) -> PretrainedNotFoundError:
    return PretrainedNotFoundError(
        f"no caption encoder could be loaded from {source!r}: {str(error).splitlines()[0]} "
        f"To get one: {how_to_get(config.model)}"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep `transformers` from drawing bars and reporting the pooler that nothing reads."""
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if bars:
            hf_logging.enable_progress_bar()


def _for_inference(model: transformers.PreTrainedModel) -> nn.Module:
    """Frozen; word embeddings, which may be stored smaller, come out of their table as float32."""
    model.eval().requires_grad_(False)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    return model


def _digest(model: transformers.PreTrainedModel) -> str:
    """sha256 over every weight in fp16, by name; the pooler, which nothing reads, is dropped."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        sha.update(f"{name}{tuple(weight.shape)}".encode())
        sha.update(weight.detach().to("cpu", torch.float16).contiguous().numpy())
    return sha.hexdigest()


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


def identify(encoder: HFCaptionEncoder) -> EncoderIdentity:
    """What to store so that `check_encoder` recognises this encoder."""
    return EncoderIdentity(encoder.id, encoder.digest, fingerprint(encoder))


def fingerprint(encoder: HFCaptionEncoder) -> tuple[tuple[float, ...], ...]:
    """`embed` of PROBES, rounded to what matters: sensitive to weights, prefix and tokenizer."""
    return tuple(tuple(round(x, 4) for x in row) for row in encoder.embed(PROBES).tolist())


def check_encoder(expected: EncoderIdentity, encoder: HFCaptionEncoder) -> None:
    """Make sure that a bundle meets the caption encoder it was trained with.

    Other weights whose probes agree (full precision instead of 4 bits) pass with a warning; the
    same weights behind another prefix or tokenizer do not.

    Raises:
        BundleError: the encoder reads captions differently.
    """
    wanted = f"caption encoder {expected.id!r} (weights {expected.digest[:12]})"
    found = f"{encoder.id!r} (weights {encoder.digest[:12]})"
    probes = torch.tensor(expected.probes)
    if probes.shape[-1] != encoder.width:
        raise BundleError(
            f"the bundle wants {wanted}, {probes.shape[-1]} wide; {found} is {encoder.width} wide"
        )
    cosine = F.cosine_similarity(probes, torch.tensor(fingerprint(encoder))).min().item()
    if cosine < MIN_PROBE_COSINE:
        raise BundleError(
            f"the bundle wants {wanted}; {found} reads captions differently (cosine {cosine:.3f}, "
            f"at least {MIN_PROBE_COSINE} is needed). Set caption_encoder.model to {expected.id!r} "
            "and its prefix to the one it was trained with"
        )
    if encoder.digest != expected.digest:
        logger.warning("%s stands in for %s; their probes agree to %.4f", found, wanted, cosine)
