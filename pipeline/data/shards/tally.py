"""What became of everything that a source holds: used, or left out for a reason with an example.

Sources yield samples, and `LeftOut` for what they cannot use. All of it is counted here, once, and
the manifest keeps the result: `tessera ingest` ends with it as a table.

    tally = Tally()
    for outcome in settled(source):
        tally.add(outcome)
    tally.losses()          # (Loss(of="image", reason="no_picture", count=3, example="row 7 ..."),)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.contracts import LeftOut, Sample, Source
from pipeline.errors import DataError

NO_PICTURE, NO_CAPTION, UNDECODABLE = "no_picture", "no_caption", "undecodable"
REASONS = {
    NO_PICTURE: (
        "there is no picture where one is named, or none is named",
        "check the paths, or name what holds the picture with --image",
    ),
    NO_CAPTION: (
        "nothing says what the picture shows; the picture is kept, for the tokenizer's training",
        "name the captions with --caption; `tessera ingest unlabelled` takes pictures alone",
    ),
    UNDECODABLE: ("the content is no PNG, JPEG or WebP", "convert the pictures to one of these"),
    "other_format": (
        "an image file of a format that is not read",
        "convert the pictures to PNG, JPEG or WebP",
    ),
    "url": (
        "an address stands where a picture should be",
        "pictures are not fetched: get them first, for example with img2dataset, and read its tars "
        "with `tessera ingest webdataset`",
    ),
    "several_pictures": (
        "a list of several pictures stands where one should be",
        "write one row per picture",
    ),
    "outside_folder": (
        "a path that leads out of the data set's folder",
        "put the pictures into the folder, and name them by their paths in it",
    ),
    "link": (
        "a symbolic link out of the folder, or a link in a tar",
        "copy what it points to into the folder, or read links with --follow-links",
    ),
    "unsafe_name": ("a tar member with .. in its path", "write the tar again with plain names"),
    "bad_name": ("a file's name is not UTF-8", "rename the file"),
    "too_large": ("a tar member or sample beyond 256 MB", "write smaller pictures"),
    "scattered_key": (
        "the members of a sample lie apart in the tar",
        "sort the tar: tar --sort=name",
    ),
    "duplicate_key": ("another sample of the same tar has the key", "give every sample its own"),
    "failed_download": ("img2dataset's status says so", "run img2dataset again"),
    "bad_json": ("text that is no JSON object", "write the file again"),
    "bad_utf8": (
        "text that is not UTF-8",
        "convert the text to UTF-8, or say how it is written, for example --encoding cp1252",
    ),
    "bad_caption": (
        "a caption of a form that is not understood",
        "name the text itself with --caption, in an object as FIELD.NAME",
    ),
    "bad_entry": ("an entry that lacks what it needs", "write the file again"),
    "too_many_fields": (
        "a row of a CSV with more fields than its header",
        'put captions with commas into quotes: 1.png,"a red, juicy apple"',
    ),
    "not_read": ("a file that is neither picture nor caption", ""),
}
"""By reason, what was wrong, and what to do about it. Preprocessing has more reasons, about what
images show when they are decoded (pipeline/data/preprocess/decode.py)."""

EXAMPLE_CHARS = 160
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpg", b"RIFF": "webp"}
"""The extension of the images whose bytes begin so."""


class Loss(BaseModel):
    """How often a source lost something for one reason.

    Attributes:
        count: how many images, captions or files.
        example: one of them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: Literal["image", "caption", "file"]
    reason: str
    count: int = Field(ge=1)
    example: str


@dataclass
class Tally:
    """What a source holds, counted outcome by outcome.

    Attributes:
        samples: how many, those without a caption included.
        groups: those seen.
        counts: samples by style, license and source, and captions by language; keyed by the field
            of `Manifest`.
        left_out: by what is lost and the reason.
        examples: the first of each, with the same keys.
    """

    samples: int = 0
    groups: set[str] = field(default_factory=set)
    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {
            name: Counter() for name in ("styles", "licenses", "sources", "languages")
        }
    )
    left_out: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, outcome: Sample | LeftOut) -> None:
        """Count a sample, or something left out."""
        if isinstance(outcome, LeftOut):
            key = (outcome.of, outcome.reason)
            self.left_out[key] += 1
            self.examples.setdefault(key, printable(outcome.example))
            return
        self.samples += 1
        self.groups.add(outcome.group)
        self.counts["styles"][outcome.style] += 1
        self.counts["licenses"][outcome.license] += 1
        self.counts["sources"][outcome.source] += 1
        self.counts["languages"].update(caption.language for caption in outcome.captions)

    def merge(self, other: Tally) -> None:
        """Add what another part of the source holds."""
        self.samples += other.samples
        self.groups |= other.groups
        for name, counter in other.counts.items():
            self.counts[name].update(counter)
        self.left_out.update(other.left_out)
        self.examples = other.examples | self.examples

    def losses(self) -> tuple[Loss, ...]:
        """Images first, then captions, then files; the most frequent reason first."""
        order = ("image", "caption", "file")
        rows = [
            Loss.model_validate(
                {"of": of, "reason": reason, "count": n, "example": self.examples[of, reason]}
            )
            for (of, reason), n in self.left_out.items()
        ]
        return tuple(sorted(rows, key=lambda row: (order.index(row.of), -row.count, row.reason)))

    def check(self) -> None:
        """Raises DataError unless at least one image can be used.

        An image without a caption can, where none is expected (`settled`).
        """
        if self.samples > self.left_out["image", NO_CAPTION]:
            return
        lost = self.losses()
        if not lost:
            raise DataError("the source yielded no samples: check its path and options")
        told = [_told(loss) for loss in lost]
        raise DataError(f"no picture can be used: {'; '.join(told)}. {_remedies(lost)}")


def _told(loss: Loss) -> str:
    what = "" if loss.of == "image" else f"{loss.of}s "
    return f"{what}{loss.reason} {loss.count} ({loss.example})"


def _remedies(lost: Iterable[Loss]) -> str:
    """What to do about each reason, in one sentence; that captions lack follows from others."""
    ordered = sorted(lost, key=lambda loss: loss.reason == NO_CAPTION)
    known = [REASONS[loss.reason][1] for loss in ordered if loss.reason in REASONS]
    told = "; ".join(dict.fromkeys(filter(None, known)))
    return f"{told[:1].upper()}{told[1:]}" if told else "Mend the source"


def settled(source: Source) -> Iterator[Sample | LeftOut]:
    """A source's samples and what it leaves out; samples that nothing can be done with are left
    out, too.

    A sample that should have a caption and has none is counted as a loss and kept: the tokenizer
    trains on images alone.
    """
    for outcome in source.samples():
        if isinstance(outcome, LeftOut):
            yield outcome
            continue
        if problem := image_problem(outcome.image):
            yield LeftOut(problem[0], f"{outcome.key}: {problem[1]}")
            continue
        if source.captioned and not outcome.captions:
            yield LeftOut(NO_CAPTION, outcome.key)
        yield outcome


def image_problem(encoded: bytes | None) -> tuple[str, str] | None:
    """Why bytes cannot be an image, as a reason and words; None if they begin like one."""
    if not encoded:
        return NO_PICTURE, "empty"
    if encoded.startswith(tuple(SIGNATURES)):
        return None
    return UNDECODABLE, f"begins with {bytes(encoded[:12])!r}"


def printable(text: str) -> str:
    """Text of unknown origin, safe to show: at most EXAMPLE_CHARS characters of one line.

    >>> printable("a\\x1b[31m\\nb")
    'a?[31m?b'
    """
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= EXAMPLE_CHARS else f"{shown[: EXAMPLE_CHARS - 3]}..."
