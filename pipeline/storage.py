"""Reading big files in order from any file system, going on where a transient error struck.

with open_patiently(fs, "bucket/set/00000.tar") as stream:
    stream.read(10)
"""

from __future__ import annotations

import contextlib
import io
import logging
import time

import pyarrow.fs
from pyarrow import NativeFile

LOG = logging.getLogger(__name__)
BUFFER_BYTES = 4 << 20  # asked of the file system at once: one request of an object store
ATTEMPTS = 5  # at one place of a file
FIRST_WAIT_S = 0.2  # doubled after every attempt


def open_patiently(fs: pyarrow.fs.FileSystem, path: str) -> io.BufferedReader:
    """The bytes of a file as they are stored, never decompressed.

    Reading raises OSError after ATTEMPTS failures at one place, FileNotFoundError at once.
    """
    return io.BufferedReader(_Patient(fs, path), BUFFER_BYTES)


class _Patient(io.RawIOBase):
    """Reopens the file at the place it had come to; so nothing is read twice or left out."""

    def __init__(self, fs: pyarrow.fs.FileSystem, path: str) -> None:
        self._fs, self._path, self._place = fs, path, 0
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
                LOG.warning("%s at byte %d: %s; trying again", self._path, self._place, error)
                time.sleep(FIRST_WAIT_S * 2**attempt)
            else:
                buffer[: len(chunk)] = chunk
                self._place += len(chunk)
                return len(chunk)
        raise AssertionError("the last attempt returns or raises")

    def _read(self, size: int) -> bytes:
        if self._file.closed:
            self._file = self._fs.open_input_file(self._path)
        try:
            self._file.seek(self._place)
            chunk: bytes = self._file.read(size)
            if not chunk and self._place < self._file.size():
                raise OSError(f"nothing came although the file has {self._file.size()} bytes")
        except OSError:
            with contextlib.suppress(OSError):
                self._file.close()
            raise
        return chunk

    def close(self) -> None:
        self._file.close()
        super().close()
