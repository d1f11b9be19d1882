"""Generate: draw pictures of a prompt and write them as files, without a server.

    tessera generate "a red apple" --out apple.png --n 4 --seed 1

The file's name says its format (PNG, JPEG, WebP); each names its prompt, seed, model and settings,
as the service's files do (serve/encode.py), or all but the prompt.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from jobs.options import image_format
from pipeline.bundles.bundle import load_generator
from pipeline.bundles.provenance import describe
from pipeline.bundles.registry import CHAMPION, has_champion, resolve_model
from pipeline.contracts import MAX_SEED, GenerationRequest
from pipeline.images.grid import grid
from serve.encode import encode
from serve.messages import OutputOptions

QUALITY = 95
"""Of JPEG and WebP, 0 to 100; above it JPEG files only grow."""
FALLBACK = "asset:base"


def default_model(home: Path, name: str) -> str:
    """The champion under `home`, or the shipped base while there is none."""
    return f"models:/{name}@{CHAMPION}" if has_champion(home, name) else FALLBACK


def generate(
    prompt: str,
    out: Path,
    *,
    home: Path,
    model: str,
    num_images: int = 1,
    seed: int | None = None,
    keep_prompt: bool = True,
    style: str | None = None,
    guidance_scale: float | None = None,
    temperature: float | None = None,
    num_steps: int | None = None,
) -> list[Path]:
    """Draw `num_images` images with the seeds seed, seed + 1, ...

    A single image is written to `out`. Of several, each is written to NAME-1.png, NAME-2.png, ...
    beside it, and `out` shows them all in a row.

    Args:
        seed: None draws another one each time.
        keep_prompt: whether a file's metadata holds its prompt; the seed is always there.

    Returns:
        The files written, `out` first.

    Raises:
        RequestError: a setting is outside the model's limits.
        BundleError: there is no such model.
        ResourceError: `out` cannot be written, or names no format of images.
    """
    output = OutputOptions(image_format(out), QUALITY)
    resolved = resolve_model(model, home=home)
    generator = load_generator(resolved.path, pretrained_cache=home / "pretrained")
    seed = secrets.randbelow(MAX_SEED + 1) if seed is None else seed
    requests = [
        GenerationRequest(prompt, (seed + i) % (MAX_SEED + 1), style, guidance_scale,
                          temperature, num_steps)
        for i in range(num_images)
    ]  # fmt: skip
    images = generator.generate(requests)
    out.parent.mkdir(parents=True, exist_ok=True)
    told = [describe(r, model=resolved.name, version=resolved.version) for r in requests]
    if not keep_prompt:
        told = [{k: v for k, v in metadata.items() if k != "prompt"} for metadata in told]
    encoded = [
        encode(image, output, metadata) for image, metadata in zip(images, told, strict=True)
    ]
    if len(encoded) == 1:
        out.write_bytes(encoded[0])
        return [out]
    return _write_row(out, encoded, images, output)


def _write_row(
    out: Path, encoded: Sequence[bytes], images: Tensor, output: OutputOptions
) -> list[Path]:
    paths = [out.with_name(f"{out.stem}-{i}{out.suffix}") for i in range(1, len(encoded) + 1)]
    for path, content in zip(paths, encoded, strict=True):
        path.write_bytes(content)
    grid(images, columns=len(paths)).save(out, format=output.format, quality=output.quality)
    return [out, *paths]
