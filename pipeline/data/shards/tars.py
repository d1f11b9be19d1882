"""WebDataset tars read as a stream, whoever wrote them: nothing is extracted, nothing is trusted.

Consecutive members whose paths agree up to the first dot of the file name are one sample, as
webdataset has it, unless the names themselves have dots: where photo.1.png and photo.1.txt lie
beside photo.2.png and photo.2.txt, photo.1 and photo.2 are samples. A member that comes a second
time begins another sample of the same key. A sample that cannot be used is yielded with the reason,
so that every sample of a tar is counted.

    with open_patiently(fs, path) as stream:
        for sample in read_samples(stream):
            print(sample.key, sorted(sample.files))        # 000000012 ['jpg', 'json', 'txt']
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field

from pipeline.data.shards.files import CHUNK
from pipeline.errors import DataError

LANGUAGE = r"(?P<language>[A-Za-z]{2,3}(?:[-_]\w+)*)"
"""Matches a BCP 47 tag, written with hyphens or underscores."""
IMAGE_EXTENSIONS = ("webp", "png", "jpg", "jpeg")
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
CAPTION_EXTENSIONS = ("txt", "caption")
TEXT_EXTENSIONS = ("json", *CAPTION_EXTENSIONS)
MAX_MEMBER_BYTES = 256_000_000  # of an image, and of all members of a sample together
MAX_TEXT_BYTES = 4_000_000
MAX_HEADER_BYTES = 1_000_000  # of a long name or of extended attributes
MAX_PENDING = 256  # parts of names that are held until it is known which are samples
_MEMBER = re.compile(r"^(?P<key>(?:.*/)?[^./][^./]*)\.(?P<rest>[^/]+)$", re.DOTALL)


class Members(BaseModel):
    """Which members of a sample are its image and its captions.

    Attributes:
        image: the extension, for example "png" or "input.jpg"; None: the first of IMAGE_EXTENSIONS
            that there is, else the only member that ends with one.
        captions: languages by extension ("txt") or field of the JSON ("json.prompt"); empty:
            KEY.txt and KEY.caption, also with a language (KEY.zh.txt), and what the JSON calls
            captions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: str | None = None
    captions: Mapping[str, str] = Field(default_factory=dict)

    def is_image(self, extension: str) -> bool:
        """Whether a member with this extension can be an image."""
        return extension == self.image or extension in IMAGE_EXTENSIONS

    def is_text(self, extension: str) -> bool:
        """Whether a member with this extension can say something of an image."""
        return extension in self.captions or extension in TEXT_EXTENSIONS

    def split(self, rest: str) -> tuple[str, str]:
        """What follows a name's first dot, as more of the name and an extension in lower case.

        >>> Members().split("0.png"), Members(image="input.jpg").split("input.jpg")
        (('0', 'png'), ('', 'input.jpg'))
        """
        for extension in (self.image or "", *self.captions):
            if "." in extension and f".{rest.lower()}".endswith(f".{extension}"):
                return rest[: -len(extension)].rstrip("."), extension
        more, _, extension = rest.rpartition(".")
        return more, extension.lower()


@dataclass
class TarSample:
    """The members of a tar that are one sample.

    Attributes:
        key: the part of their paths that they have in common.
        files: contents by extension, lower case: "jpg", "json", "zh.txt".
        problem: why the sample cannot be used: unsafe_name, link, too_large or scattered_key
            (its members lie apart in the tar).
        members: which of them is the image.
    """

    key: str
    files: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None
    members: Members = field(default_factory=Members)

    @property
    def image_extension(self) -> str | None:
        """Of the member that is the image; None without one, and where several could be."""
        if self.members.image is not None:
            return self.members.image if self.members.image in self.files else None
        plain = next((name for name in IMAGE_EXTENSIONS if name in self.files), None)
        others = [name for name in self.files if name.rpartition(".")[2] in IMAGE_EXTENSIONS]
        return plain or (others[0] if len(others) == 1 else None)

    @property
    def image(self) -> bytes | None:
        """The encoded image, if there is one."""
        name = self.image_extension
        return None if name is None else self.files[name]


@dataclass
class _Group:
    """Consecutive members whose names agree up to the first dot, before it is known which of them
    are one sample.

    Attributes:
        key: what they have in common.
        files: contents by what follows of the name ("" or "v1.0"), then by extension.
        problems: the first of each, by the same.
    """

    key: str
    members: Members
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    def add(self, more: str, extension: str, content: bytes, problem: str | None) -> None:
        files = self.files.setdefault(more, {})
        files[extension] = content
        if problem is not None:
            self.problems.setdefault(more, problem)
        if sum(map(len, files.values())) > MAX_MEMBER_BYTES:
            self.files[more] = {extension: b""}
            self.problems.setdefault(more, "too_large")

    def is_full(self) -> bool:
        """Whether so much is held that it has to be told apart as it is."""
        size = sum(len(content) for files in self.files.values() for content in files.values())
        return len(self.files) > 1 and (len(self.files) > MAX_PENDING or size > MAX_MEMBER_BYTES)

    def _is_sample(self, more: str) -> bool:
        """Whether there are an image and a text of this name."""
        files = self.files[more]
        return any(map(self.members.is_image, files)) and any(map(self.members.is_text, files))

    def done_before(self, more: str) -> list[TarSample]:
        """The samples that are whole now that a member of another name comes; they are removed."""
        whole = [
            name
            for name in self.files
            if name and not f"{more}.".startswith(f"{name}.") and self._is_sample(name)
        ]
        return [sample for name in whole for sample in self._part(name).samples()]

    def _part(self, name: str) -> _Group:
        """A name and those that go on from it, removed from here."""
        part = _Group(self.key, self.members, problems=self.problems)
        for other in [n for n in self.files if f"{n}.".startswith(f"{name}.")]:
            part.files[other] = self.files.pop(other)
        return part

    def samples(self) -> list[TarSample]:
        """What the members are. A name with both image and text is a sample, and so is the name up
        to the first dot; others belong to the longest of these that they go on from, or are
        samples themselves."""
        for name in list(self.files):
            before, _, last = name.rpartition(".")
            is_language = re.fullmatch(LANGUAGE, last) and not any(
                map(self.members.is_image, self.files[name])
            )
            if name and is_language and before in self.files:
                self._join(name, before)
        owners = {name for name in self.files if not name or self._is_sample(name)}
        for name in list(self.files):
            parts = name.split(".") if name else []
            starts = (".".join(parts[:count]) for count in reversed(range(len(parts))))
            owner = next((start for start in starts if start in owners), None)
            if name not in owners and owner is not None:
                self._join(name, owner)
        return [
            TarSample(
                f"{self.key}.{name}" if name else self.key,
                files, self.problems.get(name), self.members,
            )
            for name, files in self.files.items()
        ]  # fmt: skip

    def _join(self, name: str, owner: str) -> None:
        """Make the members of a name members of another that it goes on from."""
        between = name.removeprefix(owner).lstrip(".").lower()
        for extension, content in self.files.pop(name).items():
            self.files[owner][f"{between}.{extension}"] = content
        if name in self.problems:
            self.problems.setdefault(owner, self.problems[name])


def read_samples(
    stream: IO[bytes], *, name: str = "the tar", members: Members | None = None
) -> Iterator[TarSample]:
    """Every sample of a tar, plain or gzipped, in the tar's order.

    Args:
        name: what messages call the tar.
        members: which of a sample's members are read.

    Raises:
        DataError: the tar is no tar, is damaged, or ends early.
        OSError: the stream cannot be read.
    """
    seen: set[str] = set()
    for sample in _samples(stream, name, members or Members()):
        yield _finished(sample, seen)


def _samples(stream: IO[bytes], name: str, members: Members) -> Iterator[TarSample]:
    group: _Group | None = None
    for member, content in _members(stream, name, members):
        match = _MEMBER.match(member.name)
        if match is None:  # a README, a hidden file: no part of any sample
            continue
        more, extension = members.split(match["rest"])
        if group is not None:
            is_repeated = extension in group.files.get(more, ())
            if group.key != match["key"] or is_repeated or group.is_full():
                yield from group.samples()
                group = None
            else:
                yield from group.done_before(more)
        group = group or _Group(match["key"], members)
        group.add(more, extension, content, _problem(member, members))
    if group is not None:
        yield from group.samples()


def _finished(sample: TarSample, seen: set[str]) -> TarSample:
    """Mark a sample that lacks its image or its text and whose key came before: the other half."""
    partial = sample.image is None or len(sample.files) == 1
    if sample.key in seen and partial and sample.problem is None:
        sample.problem = "scattered_key"
    seen.add(sample.key)
    return sample


def _problem(member: tarfile.TarInfo, members: Members) -> str | None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts or "\0" in member.name:
        return "unsafe_name"
    if not member.isreg():
        return "link"
    return "too_large" if member.size > (_limit(member, members) or member.size) else None


def _limit(member: tarfile.TarInfo, members: Members) -> int:
    """Bytes that a member may have; 0 for members whose content is not read."""
    extension = members.split(member.name)[1]
    if members.is_image(extension):
        return MAX_MEMBER_BYTES
    return MAX_TEXT_BYTES if members.is_text(extension) else 0


class _Header(tarfile.TarInfo):
    """A header that refuses to be read if it is large: tarfile reads one whole before any check."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type not in tarfile.REGULAR_TYPES and self.size > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        read: tarfile.TarInfo = super()._proc_member(tar)  # type: ignore[misc]
        return read


def _members(
    stream: IO[bytes], name: str, members: Members
) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Every member but folders, with its content; b"" for links and members that are too large."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Header) as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                if member.isdir():
                    continue
                content = b""
                if member.isreg() and member.size <= _limit(member, members):
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
