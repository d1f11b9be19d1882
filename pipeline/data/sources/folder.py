"""Pictures beside .txt or .caption files, or with a captions.jsonl, .csv or .parquet.

NAME.png is captioned by NAME.txt or NAME.caption, one caption per line, and NAME.zh.txt, whose
captions are Chinese. A table is captions.jsonl, .csv or .parquet (or metadata.*, as Hugging Face
names it) with a column `file`, `file_name`, `image` or `path` and the columns of
pipeline/data/shards/records.py. Every folder below may have its own table, for the images in it
and below.

    FolderSource(folder="cats", license="CC0-1.0").samples()
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from pathlib import PurePosixPath
from typing import Annotated, Any

import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq
from pydantic import Field, field_validator

from pipeline.contracts import Caption, LeftOut, Positional, Sample
from pipeline.data.shards.records import lookup, parted, tag
from pipeline.data.shards.tally import NO_PICTURE
from pipeline.data.shards.tars import CAPTION_EXTENSIONS, LANGUAGE
from pipeline.data.sources import ColumnSource
from pipeline.data.sources._files import Folder, ImageFile, Listing, make_sample, unique_names
from pipeline.errors import DataError

TABLES = tuple(
    f"{name}.{kind}" for name in ("captions", "metadata") for kind in ("jsonl", "csv", "parquet")
)
FILE_COLUMNS = ("file", "file_name", "image", "path")


CAPTION_ENDINGS = tuple(f".{extension}" for extension in CAPTION_EXTENSIONS)

Row = Mapping[str, Any]
Captioned = tuple[Row, list[Caption | LeftOut]]
"""A row with its captions."""


class FolderSource(ColumnSource):
    """The images of a folder and the folders in it, with their captions."""

    folder: Annotated[str, Positional()] = Field(min_length=1, description="A directory or URI.")
    encoding: str | None = Field(
        None,
        description="How captions and tables are written, for example cp1252 or gbk. Default: "
        "UTF-8, or UTF-16 where a file begins so.",
    )

    @field_validator("encoding")
    @classmethod
    def _is_of_text(cls, name: str | None) -> str | None:
        try:
            io.TextIOWrapper(io.BytesIO(), name)  # refuses codecs that are not of text
        except LookupError as error:
            raise ValueError(f"{error}; try utf-8, utf-16, cp1252, gbk or shift_jis") from error
        return name

    def samples(self) -> Iterator[Sample | LeftOut]:
        """By file name; then what is left out.

        Raises:
            DataError: there is no such folder, it has no images or no captions at all, or a table
                cannot be read.
        """
        folder, credits = Folder.at(self.folder), self.credits(self.folder)
        listing = folder.listing(follow_links=self.follow_links)
        images = listing.images()
        tables = _tables(listing)
        beside = _caption_files(listing.names, images)
        if not tables and not beside:
            raise DataError(
                f"{self.folder} has neither {' nor '.join(CAPTION_ENDINGS)} files beside its "
                f"pictures nor a table ({', '.join(TABLES)}); it has "
                f"{dict(Counter(PurePosixPath(n).suffix for n in listing.names))}. `tessera ingest "
                "unlabelled` takes pictures alone"
            )
        rows: dict[str, list[Captioned]] = {}
        for table in tables:
            yield from self._read(folder, listing, table, rows)
        keys = unique_names(images)
        contents = folder.contents(image.name for image in images)
        for image, content in zip(images, contents, strict=True):
            said = rows.get(image.name, [])
            found = [caption for _, captions in said for caption in captions]
            for language, name in beside.get(image.stem, ()):
                found += self._lines(folder, name, language or self.language)
            captions, left_out = parted(found)
            yield from (lost.within(image.name) for lost in left_out)
            fields = credits.fill(said[0][0] if said else {}, group=image.stem)
            yield make_sample(keys[image.name], content, image.extension, captions, fields)
        read = {name for files in beside.values() for _, name in files}
        yield from listing.unread({*keys, *tables, *read})

    def _read(
        self, folder: Folder, listing: Listing, table: str, rows: dict[str, list[Captioned]]
    ) -> Iterator[LeftOut]:
        """Put a table's rows to those of the images that they name; yield what is left out.

        Raises:
            DataError: it cannot be read, or no row names a file, or none has a caption.
        """
        columns: dict[str, None] = {}
        named = captioned = lost = 0
        for number, row in _read_table(folder.fs, f"{folder.root}/{table}", self.encoding):
            where = f"{table}, row {number}"
            if isinstance(row, LeftOut):
                lost += 1
                yield replace(row, example=f"{where} {row.example}")
                continue
            columns |= dict.fromkeys(map(str, row))
            said = self._file_of(row)
            if said is None:
                yield LeftOut(NO_PICTURE, f"{where} names no file")
                continue
            captions = self.captions_in(row)
            named, captioned = named + 1, captioned + bool(captions)
            image = listing.find(said, table.rpartition("/")[0])
            if image is None:
                yield listing.absent(said, where)
            else:
                rows.setdefault(image, []).append((row, captions))
        there = f"{self.folder}/{table} has the columns {', '.join(columns)}"
        if columns and not named:
            raise DataError(
                f"{there}; none names the pictures, as {', '.join(FILE_COLUMNS)} would: name it "
                "with --image"
            )
        if columns and not captioned and not lost:
            raise DataError(
                f"{there}; none that is read holds a caption, as caption, text or caption_zh "
                "would: name it with --caption"
            )

    def _file_of(self, row: Row) -> str | None:
        columns = FILE_COLUMNS if self.image is None else (self.image,)
        found = (lookup(row, column) for column in columns)
        return next((name for name in found if isinstance(name, str) and name.strip()), None)

    def _lines(self, folder: Folder, name: str, language: str) -> Iterator[Caption | LeftOut]:
        """One caption per line."""
        (content,) = folder.contents([name])
        try:
            text = content.decode(_encoding(content, self.encoding))
        except UnicodeError:
            yield LeftOut("bad_utf8", name, "caption")
        else:
            yield from (Caption(x.strip(), language) for x in text.splitlines() if x.strip())


SOURCE = FolderSource


def _encoding(start: bytes, given: str | None) -> str:
    """How text is written that begins with these bytes."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    return given or "utf-8-sig"


def _tables(listing: Listing) -> list[str]:
    """The tables of a folder and of the folders in it.

    Raises:
        DataError: several in one folder.
    """
    by_folder: dict[str, list[str]] = {}
    for name in listing.names:
        folder, _, file = name.rpartition("/")
        if file in TABLES:
            by_folder.setdefault(folder, []).append(name)
    for folder, names in by_folder.items():
        if len(names) > 1:
            place = f"{listing.root}/{folder}".rstrip("/")
            raise DataError(f"{place} has several tables, {', '.join(names)}: keep one")
    return [name for names in by_folder.values() for name in names]


def _caption_files(
    names: Iterable[str], images: Iterable[ImageFile]
) -> dict[str, list[tuple[str, str]]]:
    """(language or "", file) by the stem of the image that they caption."""
    stems = {image.stem for image in images}
    found: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        ending = PurePosixPath(name).suffix
        if ending.lower() not in CAPTION_ENDINGS:
            continue
        stem = name.removesuffix(ending)
        head, _, last = stem.rpartition(".")
        if stem in stems:
            found.setdefault(stem, []).append(("", name))
        elif head in stems and (language := re.fullmatch(LANGUAGE, last)):
            found.setdefault(head, []).append((tag(language[0]), name))
    return found


def _read_table(
    fs: pyarrow.fs.FileSystem, path: str, encoding: str | None
) -> Iterator[tuple[int, Row | LeftOut]]:
    """The rows of a table with their numbers, from 1; what is none with its reason."""
    try:
        if path.endswith(".parquet"):
            with pq.ParquetFile(fs.open_input_file(path)) as file:
                batches = (batch.to_pylist() for batch in file.iter_batches())
                yield from enumerate((row for batch in batches for row in batch), start=1)
            return
        with fs.open_input_file(path) as stream:
            written = _encoding(stream.read(2), encoding)
            stream.seek(0)
            # a line that cannot be decoded costs itself
            lines = io.TextIOWrapper(stream, written, errors="surrogateescape", newline="")
            read = _csv_rows if path.endswith(".csv") else _json_rows
            for number, row in read(lines):
                if not isinstance(row, LeftOut) and _is_escaped(row):
                    row = LeftOut("bad_utf8", "cannot be decoded", "caption")
                yield number, row
    except (pyarrow.lib.ArrowException, csv.Error, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _is_escaped(value: Any) -> bool:
    """Whether text in a row stands for bytes that could not be decoded."""
    if isinstance(value, str):
        return any("\udc80" <= character <= "\udcff" for character in value)
    if isinstance(value, Mapping):
        return any(map(_is_escaped, value.values()))
    return isinstance(value, list) and any(map(_is_escaped, value))


def _csv_rows(lines: io.TextIOWrapper) -> Iterator[tuple[int, Row | LeftOut]]:
    """The delimiter is a comma, or the semicolon or tab of a header without commas."""
    header = lines.readline()
    delimiter = next((d for d in ",;\t" if d in header), ",")
    reader = csv.DictReader(chain([header], lines), delimiter=delimiter)
    columns = reader.fieldnames or ()
    for number, row in enumerate(reader, start=1):
        if more := row.pop(None, None):  # where csv puts them
            said = f"has {len(columns) + len(more)} fields and the header {len(columns)}"
            yield number, LeftOut("too_many_fields", said, "caption")
        else:
            yield number, row


def _json_rows(lines: io.TextIOWrapper) -> Iterator[tuple[int, Row | LeftOut]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, LeftOut("bad_json", f"is not JSON: {error}", "caption")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            yield number, LeftOut("bad_json", "is not a JSON object", "caption")
