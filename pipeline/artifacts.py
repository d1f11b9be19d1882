"""Files that Tessera makes or ships: where they lie, and what tells one content from another.

path = resolve_path("asset:base")  # or a directory
digest = bundle_digest(path)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pipeline.errors import BundleError

ASSETS = Path(__file__).parent / "assets"
WEIGHTS = "model.safetensors"


def resolve_path(bundle: str | Path) -> Path:
    """A bundle's, tokenizer's or aligner's directory, from its path or from asset:NAME for one
    that ships with Tessera.

    Raises:
        BundleError: there is none at that place.
    """
    text = str(bundle)
    path = ASSETS / text.removeprefix("asset:") if text.startswith("asset:") else Path(text)
    if not (path / "config.json").is_file():
        raise BundleError(f"no bundle at {bundle}: {path / 'config.json'} does not exist")
    return path


def bundle_digest(bundle: str | Path) -> str:
    """sha256 over the manifests and weights of a bundle, a tokenizer or an aligner.

    Raises:
        BundleError: there is none at that place.
    """
    path = resolve_path(bundle)
    digest = hashlib.sha256()
    for name in ("config.json", WEIGHTS, "tokenizer/config.json", f"tokenizer/{WEIGHTS}"):
        if (path / name).is_file():
            digest.update(file_digest(path / name).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
