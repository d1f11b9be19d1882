"""Pictures beside their captions: NAME.png with NAME.txt, or a table of captions in the folder.

In NAME.txt every line is a caption, in NAME.zh.txt a Chinese one. A table is captions.jsonl, .csv
or .parquet (or metadata.*, as Hugging Face names it) with a column `file` or `file_name` and the
columns of pipeline/records.py. A picture without a caption and a row without its picture become
samples all the same, which preprocessing quarantines: nothing is lost without a word.

    FolderSource("cats", Credits(style="photo", source="cats@1", license="CC0-1.0")).samples()
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq

from pipeline.contracts import Caption, Sample
from pipeline.errors import DataError
from pipeline.records import LANGUAGE, Credits, captions_in, tag
from pipeline.shards import open_uri
from pipeline.sources._files import list_files, make_sample, pictures_of, read_all, unique_names

TABLES = tuple(
    f"{name}.{kind}" for name in ("captions", "metadata") for kind in ("jsonl", "csv", "parquet")
)
FILE_COLUMNS = ("file", "file_name", "image", "path")


class FolderSource:
    """The pictures of a folder and the folders in it, with their captions.

    Args:
        folder: a path or URI.
        credits: what the table does not say.

    Raises (from samples()):
        DataError: no such folder, no pictures, no captions at all, or a table that cannot be read.
    """

    def __init__(self, folder: str, credits: Credits) -> None:
        self.folder, self.credits = folder, credits
        self.fs, self.root = open_uri(folder)

    def samples(self) -> Iterator[Sample]:
        """By file name; then the table's rows without a picture."""
        names = list_files(self.fs, self.root)
        pictures = pictures_of(names, self.folder)
        table = self._table(names)
        if table is None and not any(name.endswith(".txt") for name in names):
            raise DataError(
                f"{self.folder} has neither .txt files beside its pictures nor a table "
                f"({', '.join(TABLES)}); `tessera ingest unlabelled` takes pictures alone"
            )
        rows = table if table is not None else {}
        beside = _caption_files(names) if table is None else {}
        keys = unique_names(pictures)
        contents = read_all(self.fs, self.root, [picture.name for picture in pictures])
        for picture, image in zip(pictures, contents, strict=True):
            said = rows.get(picture.name, [])
            captions = [c for row in said for c in captions_in(row, _language(row, self.credits))]
            for language, name in beside.get(picture.stem, ()):
                captions += self._lines(name, language or self.credits.language)
            texts = self.credits.fill(said[0] if said else {}, group=picture.stem)
            yield make_sample(keys[picture.name], image, picture.extension, captions, texts)
        there = {picture.name for picture in pictures}
        for name in sorted(rows.keys() - there):
            said = rows[name]
            captions = [c for row in said for c in captions_in(row, _language(row, self.credits))]
            yield make_sample(
                f"{name}.missing", b"", "png", captions, self.credits.fill(said[0], group=name)
            )

    def _lines(self, name: str, language: str) -> list[Caption]:
        """One caption a line; bytes that are no UTF-8 stay, for preprocessing to quarantine."""
        (content,) = read_all(self.fs, self.root, [name])
        lines = content.decode("utf-8", "surrogateescape").removeprefix("\ufeff").splitlines()
        return [Caption(line.strip(), language) for line in lines if line.strip()]

    def _table(self, names: list[str]) -> dict[str, list[Mapping[str, Any]]] | None:
        """Rows by the file they name, or None without a table."""
        there = [name for name in TABLES if name in names]
        if len(there) > 1:
            raise DataError(f"{self.folder} has several tables, {', '.join(there)}: keep one")
        if not there:
            return None
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for number, row in enumerate(_read_table(self.fs, f"{self.root}/{there[0]}"), start=1):
            name = next((row[c] for c in FILE_COLUMNS if isinstance(row.get(c), str)), None)
            if name is None:
                raise DataError(
                    f"{self.folder}/{there[0]}, row {number} names no file: it needs a column "
                    f"{' or '.join(FILE_COLUMNS)}, and has {', '.join(map(str, row))}"
                )
            rows.setdefault(name.removeprefix("./"), []).append(row)
        return rows


def _language(row: Mapping[str, Any], credits: Credits) -> str:
    return str(row.get("language") or credits.language)


def _caption_files(names: list[str]) -> dict[str, list[tuple[str, str]]]:
    """(language or "", file) by the stem of the picture they caption."""
    found: dict[str, list[tuple[str, str]]] = {}
    pictured = {n.rpartition(".")[0] for n in names if not n.lower().endswith(".txt")}
    for name in names:
        if not name.lower().endswith(".txt"):
            continue
        stem = name[: -len(".txt")]
        found.setdefault(stem, []).append(("", name))
        head, _, last = stem.rpartition(".")
        if head and stem not in pictured and (language := re.fullmatch(LANGUAGE, last)):
            found.setdefault(head, []).append((tag(language[0]), name))
    return found


def _read_table(fs: pyarrow.fs.FileSystem, path: str) -> Iterator[Mapping[str, Any]]:
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


def _json_lines(lines: io.TextIOWrapper, path: str) -> Iterator[Mapping[str, Any]]:
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
