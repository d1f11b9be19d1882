"""The caption encoder: a frozen pretrained language model that reads captions.

Any model that `transformers.AutoModel` loads will do: BERT types, GPT types, T5's encoder. Bundles
do not carry it; they carry its identity, see pipeline/text/encoder_identity.py.

    encoder = load_caption_encoder(recipe.caption_encoder, cache=home / "pretrained")
    states, mask = encoder.encode(["a red apple", "一个红苹果"])  # (2, L, 384), (2, L)
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.config import CaptionEncoderConfig
from pipeline.runtime import autocast
from pipeline.text.pretrained import find_language_model, not_found

if TYPE_CHECKING:  # a training on caption states that were computed before needs none of it
    import transformers

_LOADING = threading.Lock()


class HFCaptionEncoder:
    """`contracts.CaptionEncoder` over a Hugging Face model.

    Attributes:
        id: the hub id or path that the recipe names it by.
        width: channels of a state.
        max_tokens: longer captions are cut to this many tokens.
        prefix: put before every caption.
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
        self._lock = threading.Lock()  # a tokenizer keeps its last call's truncation as state

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

    def count_tokens(self, caption: str) -> int:
        """Tokens of a caption, of its prefix and around both, before they are cut."""
        with self._lock:
            found = self._tokenizer(self.prefix + caption, truncation=False, verbose=False)
        return len(found["input_ids"])

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Mean of the states, l2-normalised: float32 (B, width)."""
        return F.normalize(masked_mean(*self.encode(captions)), dim=-1)

    def _forward(self, tokens: list[list[int]]) -> Tensor:
        """Token ids of B captions -> float32 (B, L, width), zero at the padding."""
        padded = {"input_ids": tokens}
        with self._lock:
            batch = self._tokenizer.pad(padded, padding_side="right", return_tensors="pt")
        mask: Tensor = batch["attention_mask"].to(self.device)
        with autocast(self.device):
            output = self._model(input_ids=batch["input_ids"].to(self.device), attention_mask=mask)
        states: Tensor = output.last_hidden_state
        return (states.float() * mask[..., None]).cpu()


def masked_mean(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens of every caption: (B, L, C), bool (B, L) -> (B, C)."""
    weights = mask.to(states.dtype).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1).clamp(min=1)


@torch.no_grad()
def standardise(norm: nn.LayerNorm, features: Tensor) -> None:
    """Set a LayerNorm's weight and bias so that these features leave it with mean 0, variance 1.

    A language model's states lie in a narrow cone: any two captions of e5 have a cosine above 0.7.
    To a network at its initialisation all captions look nearly alike, and its loss stays on a
    plateau until it has learnt to tell them apart; standardised states spare it that.

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

    It is frozen, so a process loads it once and every caller, on any thread, gets the same object.

    Args:
        cache: the directory that a package's weights are converted into, once.

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
    """The encoder at `source`; `stamps` of its files make it load again if they are replaced."""
    import transformers

    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
            stored = (
                getattr(transformers.AutoConfig.from_pretrained(source), "dtype", None)
                or torch.float32
            )
            # While it loads, transformers makes the model's dtype the default of the whole process.
            # Other threads may generate images meanwhile and rely on float32.
            model = transformers.AutoModel.from_pretrained(source, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise not_found(source, config.model, error) from error
    if hasattr(model, "encoder") and hasattr(model, "decoder"):
        model = model.encoder  # T5 and its kin
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.get_input_embeddings().to(stored)  # 250,000 words are most of a small model
    return HFCaptionEncoder(model.to(device), tokenizer, config)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars, and its warning about a pooler that nothing reads."""
    from transformers.utils import logging as hf_logging

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
    """Freeze the model; its word embeddings, perhaps stored in float16, are read as float32."""
    model.eval().requires_grad_(False)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _module, _inputs, output: output.float())
    return model


def _digest(model: transformers.PreTrainedModel) -> str:
    """sha256 over every weight in fp16, by name; the pooler, which nothing reads, is dropped."""
    if getattr(model, "pooler", None) is not None:
        model.register_module("pooler", None)
    sha = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        sha.update(f"{name}{tuple(weight.shape)}".encode())
        sha.update(weight.detach().to("cpu", torch.float16).contiguous().numpy())
    return sha.hexdigest()
