"""Files on any file system that PyArrow knows: read where it may fail, published in one move.

    with open_patiently(fs, "bucket/set/00000.tar") as stream:
        stream.read(10)
    publish(fs, "bucket/set/manifest.json", b"{}")

Directories and files on local disks that several processes may write at once are the business of
pipeline/artifacts.py; object stores have no locks.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
from typing import IO

import pyarrow.fs
from pyarrow import NativeFile

LOG = logging.getLogger(__name__)
BUFFER_BYTES = 4 << 20  # asked of the file system at once: one request of an object store
CHUNK = 1 << 20  # bytes copied at once
ATTEMPTS = 5  # to read at one position of a file
FIRST_WAIT_S = 0.2  # doubled after every attempt
PARTIAL = ".partial"  # ends the name of a file that is being written


def open_patiently(fs: pyarrow.fs.FileSystem, path: str) -> io.BufferedReader:
    """The bytes of a file as they are stored, never decompressed.

    Reading raises OSError after ATTEMPTS failures at one place, FileNotFoundError at once.
    """
    return io.BufferedReader(_Patient(fs, path), BUFFER_BYTES)


class _Patient(io.RawIOBase):
    """A file that is reopened after an error at the byte it had come to."""

    def __init__(self, fs: pyarrow.fs.FileSystem, path: str) -> None:
        self._fs, self._path, self._position = fs, path, 0
        self._file: NativeFile = fs.open_input_file(path)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        for attempt in range(ATTEMPTS):
            try:
                chunk = self._read(len(buffer))
            except FileNotFoundError:
                raise
            except OSError as error:
                if attempt + 1 == ATTEMPTS:
                    raise
                LOG.warning("%s at byte %d: %s; trying again", self._path, self._position, error)
                time.sleep(FIRST_WAIT_S * 2**attempt)
            else:
                buffer[: len(chunk)] = chunk
                self._position += len(chunk)
                return len(chunk)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, size: int) -> bytes:
        if self._file.closed:
            self._file = self._fs.open_input_file(self._path)
        try:
            self._file.seek(self._position)
            chunk: bytes = self._file.read(size)
            if not chunk and self._position < self._file.size():
                raise OSError(f"nothing came although the file has {self._file.size()} bytes")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        return chunk

    def close(self) -> None:
        self._file.close()
        super().close()


def publish(fs: pyarrow.fs.FileSystem, path: str, content: bytes | IO[bytes]) -> None:
    """Write beside `path`, then move: never half a file under its final name."""
    with fs.open_output_stream(f"{path}{PARTIAL}", compression=None) as out:
        if isinstance(content, bytes):
            out.write(content)
        else:
            while chunk := content.read(CHUNK):
                out.write(chunk)
    fs.move(f"{path}{PARTIAL}", path)
