"""WebDataset tars read as a stream, whoever wrote them: nothing is extracted, nothing is trusted.

Consecutive members whose paths agree up to the first dot of the file name are one sample; a member
that comes a second time begins another sample of the same key. A sample that cannot be used is
yielded with the reason, so that every sample of a tar is counted.

    with open_patiently(fs, path) as stream:
        for sample in read_samples(stream):
            print(sample.key, sorted(sample.files))        # 000000012 ['jpg', 'json', 'txt']
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

from pipeline.data.shards.files import CHUNK
from pipeline.errors import DataError

IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
TEXT_EXTENSIONS = ("json", "txt")
MAX_MEMBER_BYTES = 256_000_000  # of an image, and of all members of a sample together
MAX_TEXT_BYTES = 4_000_000
MAX_HEADER_BYTES = 1_000_000  # of a long name or of extended attributes
_MEMBER = re.compile(r"^(?P<key>(?:.*/)?[^./][^./]*)\.(?P<extension>[^/]+)$", re.DOTALL)


@dataclass
class TarSample:
    """The members of a tar that are one sample.

    Attributes:
        key: their common path, up to the first dot of the file name.
        files: contents by extension, lower case: "jpg", "json", "zh.txt".
        problem: why the sample cannot be used: unsafe_name, link, too_large or scattered_key
            (its members lie apart in the tar).
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    @property
    def image(self) -> bytes | None:
        """The encoded image, if there is one."""
        return next((self.files[name] for name in IMAGE_EXTENSIONS if name in self.files), None)


def read_samples(stream: IO[bytes], *, name: str = "the tar") -> Iterator[TarSample]:
    """Every sample of a tar, plain or gzipped, in the tar's order.

    Args:
        name: what messages call the tar.

    Raises:
        DataError: the tar is no tar, is damaged, or ends early.
        OSError: the stream cannot be read.
    """
    seen: set[str] = set()
    sample: TarSample | None = None
    for member, content in _members(stream, name):
        match = _MEMBER.match(member.name)
        if match is None:  # a README, a hidden file: no part of any sample
            continue
        key, extension = match["key"], match["extension"].lower()
        if sample is None or sample.key != key or extension in sample.files:
            if sample is not None:
                yield _finished(sample, seen)
            sample = TarSample(key)
        sample.files[extension] = content
        sample.problem = sample.problem or _problem(member)
        if sum(map(len, sample.files.values())) > MAX_MEMBER_BYTES:
            sample.files, sample.problem = {extension: b""}, sample.problem or "too_large"
    if sample is not None:
        yield _finished(sample, seen)


def _finished(sample: TarSample, seen: set[str]) -> TarSample:
    """Mark a sample that lacks its image or its text and whose key came before: the other half."""
    partial = sample.image is None or len(sample.files) == 1
    if sample.key in seen and partial and sample.problem is None:
        sample.problem = "scattered_key"
    seen.add(sample.key)
    return sample


def _problem(member: tarfile.TarInfo) -> str | None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return "unsafe_name"
    if not member.isreg():
        return "link"
    return "too_large" if member.size > (_limit(member) or member.size) else None


def _limit(member: tarfile.TarInfo) -> int:
    """Bytes that a member may have; 0 for members whose content is not read."""
    extension = member.name.lower().rpartition(".")[2]
    if extension in IMAGE_EXTENSIONS:
        return MAX_MEMBER_BYTES
    return MAX_TEXT_BYTES if extension in TEXT_EXTENSIONS else 0


class _Header(tarfile.TarInfo):
    """A header that refuses to be read if it is large: tarfile reads one whole before any check."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        read: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return read


def _members(stream: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every member but folders, with its content; b"" for links and members that are too large."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                if member.isdir():
                    continue
                content = b""
                if member.isreg() and member.size <= _limit(member):
                    file = tar.extractfile(member)
                    assert file is not None, "a regular member has a stream"
                    content = file.read()
                yield member, content
            _check_end(tar, name)
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{name} is no whole tar: {error}; write or fetch it again") from error


def _check_end(tar: Any, name: str) -> None:
    """Raise DataError unless zeros end the tar: tarfile stops silently where one is damaged."""
    found = False
    while chunk := tar.fileobj.read(CHUNK):
        found = True
        if chunk.strip(b"\0"):
            raise DataError(f"{name} is damaged: no header at a member; write or fetch it again")
    if not found:
        raise DataError(f"{name} is cut: it ends without tar's end mark; write or fetch it again")
