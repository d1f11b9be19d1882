"""Hugging Face style Parquet: pictures embedded or beside the table, captions in columns.

The column of images holds bytes, a path in the data set's folder, a struct {bytes, path}, or a list
of one of these per row; a caption column holds what `read_captions` in
pipeline/data/shards/records.py knows. Files are read batch by batch, so a table may be larger than
memory.

    ParquetSource(table="s3://bucket/pokemon", captions=("text:en",), license="MIT").samples()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.contracts import LeftOut, Positional, Sample
from pipeline.data.shards.records import FIELDS, captions_in, parted
from pipeline.data.shards.tally import NO_PICTURE, SIGNATURES
from pipeline.data.sources import ColumnSource
from pipeline.data.sources._files import Folder, Listing, is_url, make_sample
from pipeline.errors import DataError

BATCH = 64  # rows read at once; an image may have megabytes


class ParquetSource(ColumnSource):
    """The rows of a Parquet file, or of every one in a folder."""

    table: Annotated[str, Positional()] = Field(
        min_length=1, description="A .parquet file, or a folder of them: a path or URI."
    )
    image: str = Field("image", description="The column that holds or names the pictures.")

    def samples(self) -> Iterator[Sample | LeftOut]:
        """File by file, row by row.

        Raises:
            DataError: there is no such file, it is not Parquet, or it lacks a column.
        """
        tables = _Tables.at(self.table, self.follow_links)
        for name in tables.names:
            try:
                path = f"{tables.folder.root}/{name}"
                with pq.ParquetFile(tables.folder.fs.open_input_file(path)) as file:
                    columns = self._columns(file.schema_arrow, name)
                    yield from self._rows(file, columns, name, tables)
            except pyarrow.lib.ArrowException as error:
                raise DataError(f"{name} cannot be read as Parquet: {error}") from error
        yield from tables.left_out

    def _columns(self, schema: pa.Schema, name: str) -> list[str]:
        """The columns to read of a table.

        Raises:
            DataError: it lacks one that is named, or none can hold captions.
        """
        named = [_column(field, schema) for field in self.caption_fields()]
        there = ", ".join(f"{field.name} ({field.type!s:.50})" for field in schema)
        lacking = [column for column in (self.image, *named) if column not in schema.names]
        if lacking:
            raise DataError(
                f"{name} has no column {', '.join(lacking)}; it has {there}. "
                "Name them with --image and --caption"
            )
        if not named:
            others = [column for column in schema.names if column != self.image]
            named = [c for c in others if captions_in({c: "x"}, self.language)]
        if not named:
            raise DataError(
                f"{name} has no column with a name like caption, text or caption_zh; it has "
                f"{there}. Name the one that holds the captions with --caption"
            )
        kept = {self.image, *named, *FIELDS, "author", "language"}
        return [column for column in schema.names if column in kept]

    def _rows(
        self, file: pq.ParquetFile, columns: list[str], name: str, tables: _Tables
    ) -> Iterator[Sample | LeftOut]:
        stem, first = str(PurePosixPath(name).with_suffix("")), 0
        for batch in file.iter_batches(BATCH, columns=columns):
            rows = _as_dicts(batch)
            cells = [row if row is None else _picture(row.pop(self.image)) for row in rows]
            paths = [tables.find(cell, name) if isinstance(cell, str) else None for cell in cells]
            contents = tables.folder.contents(paths)
            for number, (row, cell, content) in enumerate(
                zip(rows, cells, contents, strict=True), start=first
            ):
                where, path = f"{name}, row {number}", paths[number - first]
                if row is None or cell is None:
                    yield LeftOut("bad_utf8", where)
                elif isinstance(cell, LeftOut):
                    yield replace(cell, example=f"{where}: {self.image} {cell.example}")
                elif isinstance(cell, str) and path is None:
                    yield tables.listing.absent(cell, where)
                else:
                    image = cell if isinstance(cell, bytes) else content
                    yield from self._sample(row, image, f"{stem}-{number:09d}", where)
            first += len(rows)

    def _sample(
        self, row: dict[str, Any], image: bytes, key: str, where: str
    ) -> Iterator[Sample | LeftOut]:
        captions, left_out = parted(self.captions_in(row))
        yield from (lost.within(where) for lost in left_out)
        fields = self.credits(self.table).fill(row, group=key)
        yield make_sample(key, image, _extension(image), captions, fields)


SOURCE = ParquetSource


@dataclass(frozen=True)
class _Tables:
    """The Parquet files of a data set.

    Attributes:
        folder: the data set's.
        names: paths of the Parquet files in it.
        follow_links: see `FolderReader`.
    """

    folder: Folder
    names: tuple[str, ...]
    follow_links: bool

    @classmethod
    def at(cls, address: str, follow_links: bool) -> _Tables:
        """Of a folder, or the one that `address` is.

        Raises:
            DataError: there is none.
        """
        folder = Folder.at(address)
        if folder.fs.get_file_info(folder.root).type == pyarrow.fs.FileType.File:
            root, _, name = folder.root.rpartition("/")
            return cls(Folder(address, folder.fs, root), (name,), follow_links)
        found = cls(folder, (), follow_links)
        names = tuple(name for name in found.listing.names if name.endswith(".parquet"))
        if not names:
            links = "".join(f"; {item.reason}: {item.example}" for item in found.left_out[:1])
            remedy = " (--follow-links reads links)" if links else ""
            raise DataError(f"there is no .parquet file in {address}{links}{remedy}")
        return replace(found, names=names)

    @cached_property
    def listing(self) -> Listing:
        """The data set's files; of a single table, listed when it names the first one."""
        return self.folder.listing(follow_links=self.follow_links)

    @property
    def left_out(self) -> tuple[LeftOut, ...]:
        """Files that are not read."""
        return self.listing.left_out if "listing" in self.__dict__ else ()

    def find(self, path: str, table: str) -> str | None:
        """The file that a path in a table means; None if the data set's folder has none."""
        return None if is_url(path) else self.listing.find(path, table.rpartition("/")[0])


def _column(field: str, schema: pa.Schema) -> str:
    """The column that a field is, or is in."""
    return field if field in schema.names else field.partition(".")[0]


def _as_dicts(batch: pa.RecordBatch) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one with text that is not UTF-8."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if len(batch) == 1:
            return [None]
        return [row for i in range(len(batch)) for row in _as_dicts(batch.slice(i, 1))]


def _picture(value: Any) -> bytes | str | LeftOut:
    """The encoded image of a cell, or its path or address, or why there is neither."""
    if isinstance(value, list):
        if len(value) > 1:
            return LeftOut("several_pictures", f"holds a list of {len(value)}")
        return _picture(value[0] if value else None)
    if isinstance(value, Mapping):
        held = value.get("bytes") or value.get("path")
        if not held:
            return LeftOut(NO_PICTURE, f"holds {', '.join(map(str, value))} without bytes or path")
        return _picture(held)
    if isinstance(value, bytes | str) and value:
        return value
    return LeftOut(NO_PICTURE, f"holds {value!r:.40}")


def _extension(image: bytes) -> str:
    """By the first bytes: it names the file in the shard; decoding looks at the bytes itself."""
    return next((name for start, name in SIGNATURES.items() if image.startswith(start)), "jpg")
