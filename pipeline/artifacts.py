"""Files that Tessera makes or ships: where they lie, their digests, how they are published.

A result that follows from files can also be remembered for as long as the files stay the same.

    path = resolve_path("asset:base")  # or a directory
    digest = bundle_digest(path)

    publish_once(cache / "encoder", convert)        # convert(path) writes a file or a directory
    with publishing(folder / "DONE.json") as path:  # a file; the latest one stays
        path.write_text(record)

    digest = remembered("sha256", [file], partial(file_digest, file), folder=cache)

Publishing is atomic: nobody ever sees half a file or directory under its final name. While one is
being written it lies in a hidden folder beside that name, .NAME.new, which is locked: of several
processes, on any machines that share the disk, one writes and the others wait. The lock dies with
its process, and the next to publish the same name clears away what a killed one left.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from pipeline.errors import BundleError

ASSETS = Path(__file__).parent / "assets"
"""What ships with Tessera: a base bundle, an aligner, a shard set."""
WEIGHTS = "model.safetensors"
"""The weights of a bundle, a tokenizer or an aligner, in its directory."""
LOCK = ".lock"
"""The locked file in the folder of what is being written."""
SETTLED_S = 2
"""Seconds after which a file's times tell it from any later version."""


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


# ---- Publishing ----------------------------------------------------------------------------------


def publish_once(
    target: Path,
    make: Callable[[Path], object],
    *,
    is_done: Callable[[Path], bool] = Path.exists,
) -> Path:
    """Make a file or a directory unless it is there: of several processes the first one makes it,
    the others wait for it and make nothing.

    Args:
        target: the final path, whose folder is made if need be.
        make: writes a file or a directory at the path that it is given, which does not exist yet
            and has the final name. What it raises is raised here, and nothing is published.
        is_done: tells of `target` whether it is there as wanted; a file that is not is replaced.

    Returns:
        `target`.
    """
    if not is_done(target):
        with _scratch(target) as new:
            if not is_done(target):
                make(new)
                _publish(new, target)
    return target


@contextlib.contextmanager
def publishing(target: Path) -> Iterator[Path]:
    """A path to write a file at, which replaces the file `target` when the block ends; the latest
    of several processes wins. An error in the block leaves `target` as it was.
    """
    with _scratch(target) as new:
        yield new
        _publish(new, target)


def replace_directory(finished: Path, target: Path) -> None:
    """Move a finished directory into the place of another, on the same disk.

    A process killed in between leaves nothing under the name, and the old one as .NAME.old.
    """
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    finished.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A free path named as `target` is, in a folder beside it that this block has for itself."""
    folder = target.with_name(f".{target.name}.new")
    lock = _locked(folder / LOCK)
    try:
        _clear(folder)
        yield folder / target.name
    finally:
        _clear(folder)
        (folder / LOCK).unlink()
        with contextlib.suppress(OSError):  # the next process is in it already
            folder.rmdir()
        lock.close()


def _locked(path: Path) -> IO[str]:
    """The file at `path`, made with its folder if need be, and locked until it is closed."""
    while True:
        with contextlib.suppress(FileExistsError):  # exist_ok=True fails if it then goes away
            path.parent.mkdir(parents=True)
        try:
            lock = path.open("w")
        except FileNotFoundError:  # the process that had the lock has just removed the folder
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):  # it removed the file that was opened here
            if os.path.samestat(os.fstat(lock.fileno()), path.stat()):
                return lock
        lock.close()


def _clear(folder: Path) -> None:
    """Remove what lies in a scratch folder, the lock apart."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _publish(new: Path, target: Path) -> None:
    """Give what was written its final name, and its files the permissions that the user gives new
    files: some libraries write for their owner alone, but another user may serve the model."""
    mode = (new.parent / LOCK).stat().st_mode & 0o777
    for file in [new] if new.is_file() else [f for f in new.rglob("*") if f.is_file()]:
        file.chmod(mode)
    new.replace(target)


# ---- Remembering ---------------------------------------------------------------------------------


def remembered(
    what: str,
    files: Sequence[Path],
    compute: Callable[[], Any],
    *,
    folder: Path,
    settings: Any = None,
) -> Any:
    """A result that follows from files' contents, computed again only if one of the files changed.

    A file counts as unchanged while its size, times and inode are the same. What was written in
    the last seconds is not remembered, since it could change again within one tick of its time.

    Args:
        what: names the result among others that follow from the same files.
        files: all that it follows from, beside the settings.
        compute: gives the result, as JSON values.
        folder: where results are remembered; if it cannot be written, none are.
        settings: JSON values that the result depends on too.
    """
    made_of = [what, settings, {str(file.absolute()): _stamp(file) for file in files}]
    name = hashlib.sha256(json.dumps([what, settings, sorted(made_of[2])]).encode()).hexdigest()
    record = folder / "remembered" / f"{what}-{name[:16]}.json"
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(record.read_text())
        if known["made_of"] == made_of:
            return known["result"]
    settled_ns = time.time_ns() - SETTLED_S * 10**9
    result = compute()
    if all(max(times) < settled_ns for _, *times, _ in made_of[2].values()):
        with contextlib.suppress(OSError), publishing(record) as new:
            new.write_text(json.dumps({"made_of": made_of, "result": result}))
    return result


def _stamp(file: Path) -> list[int]:
    """Size in bytes, times of modification and of change in ns, inode."""
    found = file.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
