"""Export: write a bundle in another program's format.

    tessera export models:/tessera@champion --out my-model

The causal family has such a format: an ordinary Hugging Face model directory.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer

from jobs.options import check_output
from pipeline.artifacts import publish_once
from pipeline.bundles.bundle import load_bundle, text_tokenizer_of
from pipeline.bundles.registry import resolve_model
from pipeline.errors import BundleError, ResourceError
from pipeline.models import families_that, load_family


def export(model: str, out: Path, *, home: Path) -> Path:
    """Write `model` to the new directory `out`, with its text tokenizer if it has one of its own.

    Raises:
        BundleError: the model is of a family that no other program loads.
        ResourceError: `out` exists, or lies below a file.
    """
    if out.exists():
        raise ResourceError(f"{out} exists: remove it, or name another directory")
    check_output(out)
    path = resolve_model(model, home=home).path
    bundle = load_bundle(path)
    name = bundle.manifest.generator.family
    family = load_family(name)
    if not family.exports:
        able = families_that(lambda family: family.exports)
        raise BundleError(
            f"{model} is of the family {name!r}, which has no other format; exported are: "
            f"{', '.join(able)}"
        )

    def write(directory: Path) -> None:
        family.export(bundle.model, directory)
        if source := text_tokenizer_of(path):
            AutoTokenizer.from_pretrained(source).save_pretrained(directory)

    return publish_once(out, write)
