"""Hugging Face style Parquet: pictures embedded, captions in columns.

The column of images holds structs {bytes, path} or plain bytes; a caption column holds a text or a
list of texts per row. Files are read batch by batch, so a table may be larger than memory.

    ParquetSource(table="s3://bucket/pokemon", captions=("text:en",), license="MIT").samples()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.contracts import Caption, OptionName, Positional, Sample
from pipeline.data.shards.records import FIELDS, captions_in
from pipeline.data.sources import CaptionedSource
from pipeline.data.sources._files import Folder, make_sample
from pipeline.errors import DataError

BATCH = 64  # rows read at once; an image may have megabytes
_SIGNATURES = ((b"\x89PNG", "png"), (b"RIFF", "webp"))


class ParquetSource(CaptionedSource):
    """The rows of a Parquet file, or of every one in a folder."""

    table: Annotated[str, Positional()] = Field(
        min_length=1, description="A .parquet file, or a folder of them: a path or URI."
    )
    image: str = Field("image", description="The column of the pictures.")
    captions: Annotated[tuple[str, ...], OptionName("caption")] = Field(
        (),
        description="A caption column, with its language if it is not --language: text, or "
        "text_zh:zh; may be repeated. Default: every column with a name like caption, text or "
        "caption_zh.",
    )

    def samples(self) -> Iterator[Sample]:
        """File by file, row by row.

        Raises:
            DataError: there is no such file, it is not Parquet, or it lacks a column.
        """
        folder = Folder.at(self.table)
        for name, path in _tables(folder):
            try:
                with pq.ParquetFile(folder.fs.open_input_file(path)) as file:
                    columns = self._columns(file.schema_arrow, name)
                    yield from self._rows(file, columns, name)
            except pyarrow.lib.ArrowException as error:
                raise DataError(f"{name} cannot be read as Parquet: {error}") from error

    def _languages(self) -> dict[str, str]:
        """The language of each caption column that is named."""
        columns = [caption.partition(":") for caption in self.captions]
        return {column: language or self.language for column, _, language in columns}

    def _columns(self, schema: pa.Schema, name: str) -> list[str]:
        """The columns to read of a table."""
        named = self._languages()
        lacking = [c for c in (self.image, *named) if c not in schema.names]
        if lacking:
            raise DataError(
                f"{name} has no column {', '.join(lacking)}; it has {', '.join(schema.names)}. "
                "Name them with --image and --caption"
            )
        kept = {self.image, *named, *FIELDS, "author"}
        if not named:
            others = [column for column in schema.names if column != self.image]
            kept |= {column for column in others if captions_in({column: "x"}, self.language)}
        return [column for column in schema.names if column in kept]

    def _rows(self, file: pq.ParquetFile, columns: list[str], name: str) -> Iterator[Sample]:
        number = 0
        stem = str(PurePosixPath(name).with_suffix(""))
        credits = self.credits(self.table)
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                image = _image(row.pop(self.image))
                key = f"{stem}-{number:09d}"
                fields = credits.fill(row, group=key)
                yield make_sample(key, image, _extension(image), self._captions(row), fields)
                number += 1

    def _captions(self, row: Mapping[str, Any]) -> list[Caption]:
        if not self.captions:
            return captions_in(row, self.language)
        return [
            caption
            for column, language in self._languages().items()
            for caption in captions_in({"caption": row[column]}, language)
        ]


SOURCE = ParquetSource


def _tables(folder: Folder) -> list[tuple[str, str]]:
    """(name, path) of every Parquet file; `folder` may be one itself."""
    if folder.fs.get_file_info(folder.root).type == pyarrow.fs.FileType.File:
        return [(PurePosixPath(folder.root).name, folder.root)]
    names = [name for name in folder.names() if name.endswith(".parquet")]
    if not names:
        raise DataError(f"there is no .parquet file in {folder.address}")
    return [(name, f"{folder.root}/{name}") for name in names]


def _image(value: Any) -> bytes:
    """The encoded image of a cell; b"" where there is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _extension(image: bytes) -> str:
    """By the first bytes: it names the file in the shard; decoding looks at the bytes itself."""
    return next((name for start, name in _SIGNATURES if image.startswith(start)), "jpg")
