"""Pictures beside .txt captions, or with a captions.jsonl, .csv or .parquet.

NAME.png is captioned by NAME.txt, one caption per line, and NAME.zh.txt, whose captions are
Chinese. A table is captions.jsonl, .csv or .parquet (or metadata.*, as Hugging Face names it) with
a column `file` or `file_name` and the columns of pipeline/data/shards/records.py. An image without
a caption and a row without its image become samples all the same, which preprocessing quarantines:
nothing is lost without a word.

    FolderSource(folder="cats", license="CC0-1.0").samples()
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.contracts import Caption, Positional, Sample
from pipeline.data.shards.records import LANGUAGE, captions_in, tag
from pipeline.data.sources import CaptionedSource
from pipeline.data.sources._files import Folder, make_sample, unique_names
from pipeline.errors import DataError

TABLES = tuple(
    f"{name}.{kind}" for name in ("captions", "metadata") for kind in ("jsonl", "csv", "parquet")
)
FILE_COLUMNS = ("file", "file_name", "image", "path")


Row = Mapping[str, Any]


class FolderSource(CaptionedSource):
    """The images of a folder and the folders in it, with their captions."""

    folder: Annotated[str, Positional()] = Field(min_length=1, description="A directory or URI.")

    def samples(self) -> Iterator[Sample]:
        """By file name; then the table's rows without an image.

        Raises:
            DataError: there is no such folder, it has no images or no captions at all, or its
                table cannot be read.
        """
        folder, credits = Folder.at(self.folder), self.credits(self.folder)
        names = folder.names()
        images = folder.images(names)
        rows = _rows(folder, names)
        if rows is None and not any(name.endswith(".txt") for name in names):
            raise DataError(
                f"{self.folder} has neither .txt files beside its pictures nor a table "
                f"({', '.join(TABLES)}); `tessera ingest unlabelled` takes pictures alone"
            )
        beside = _caption_files(names) if rows is None else {}
        rows = rows or {}
        keys = unique_names(images)
        contents = folder.contents(image.name for image in images)
        for image, content in zip(images, contents, strict=True):
            captions = self._captions(rows.get(image.name, []))
            for language, name in beside.get(image.stem, ()):
                captions += _lines(folder, name, language or self.language)
            fields = credits.fill(rows.get(image.name, [{}])[0], group=image.stem)
            yield make_sample(keys[image.name], content, image.extension, captions, fields)
        for name in sorted(rows.keys() - {image.name for image in images}):
            fields = credits.fill(rows[name][0], group=name)
            yield make_sample(f"{name}.missing", b"", "png", self._captions(rows[name]), fields)

    def _captions(self, rows: list[Row]) -> list[Caption]:
        return [
            caption
            for row in rows
            for caption in captions_in(row, str(row.get("language") or self.language))
        ]


SOURCE = FolderSource


def _lines(folder: Folder, name: str, language: str) -> list[Caption]:
    """One caption per line; bytes that are not UTF-8 stay, for preprocessing to quarantine."""
    (content,) = folder.contents([name])
    lines = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()
    return [Caption(line.strip(), language) for line in lines if line.strip()]


def _rows(folder: Folder, names: list[str]) -> dict[str, list[Row]] | None:
    """The table's rows by the file that they name, or None without a table."""
    there = [name for name in TABLES if name in names]
    if len(there) > 1:
        raise DataError(f"{folder.address} has several tables, {', '.join(there)}: keep one")
    if not there:
        return None
    rows: dict[str, list[Row]] = {}
    for number, row in enumerate(_read_table(folder.fs, f"{folder.root}/{there[0]}"), start=1):
        name = next((row[c] for c in FILE_COLUMNS if isinstance(row.get(c), str)), None)
        if name is None:
            raise DataError(
                f"{folder.address}/{there[0]}, row {number} names no file: it needs a column "
                f"{' or '.join(FILE_COLUMNS)}, and has {', '.join(map(str, row))}"
            )
        rows.setdefault(name.removeprefix("./"), []).append(row)
    return rows


def _caption_files(names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """(language or "", file) by the stem of the image that they caption."""
    found: dict[str, list[tuple[str, str]]] = {}
    with_image = {n.rpartition(".")[0] for n in names if not n.lower().endswith(".txt")}
    for name in names:
        if not name.lower().endswith(".txt"):
            continue
        stem = name[: -len(".txt")]
        found.setdefault(stem, []).append(("", name))
        head, _, last = stem.rpartition(".")
        if head and stem not in with_image and (language := re.fullmatch(LANGUAGE, last)):
            found.setdefault(head, []).append((tag(language[0]), name))
    return found


def _read_table(fs: pyarrow.fs.FileSystem, path: str) -> Iterator[Row]:
    try:
        if path.endswith(".parquet"):
            with pq.ParquetFile(fs.open_input_file(path)) as file:
                for batch in file.iter_batches():
                    yield from batch.to_pylist()
            return
        with fs.open_input_stream(path) as stream:
            lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
            if path.endswith(".csv"):
                yield from csv.DictReader(lines)
            else:
                yield from _json_lines(lines, path)
    except (pyarrow.lib.ArrowException, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _json_lines(lines: io.TextIOWrapper, path: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object")
        yield row
