"""Parquet tables with the pictures inside, as Hugging Face writes them.

The picture's column is a struct {bytes, path} or plain bytes; a caption column is a text or a list
of texts. Files are read batch by batch, so a table larger than memory passes through.

    ParquetSource("s3://bucket/pokemon", credits, captions={"text": "en"}).samples()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.lib
import pyarrow.parquet as pq

from pipeline.contracts import Caption, Sample
from pipeline.errors import DataError
from pipeline.records import TEXTS, Credits, captions_in
from pipeline.shards import open_uri
from pipeline.sources._files import list_files, make_sample

BATCH = 64  # rows read at once; a picture may have megabytes
_SIGNATURES = ((b"\x89PNG", "png"), (b"RIFF", "webp"))


class ParquetSource:
    """The rows of a Parquet file, or of every one in a folder.

    Args:
        table: a file or folder, a path or URI.
        credits: what columns called group, style, source, license, attribution do not say.
        image: the picture's column.
        captions: language by caption column; empty takes every column that is called like one.

    Raises (from samples()):
        DataError: no such file, no Parquet, or a column that is not there.
    """

    def __init__(
        self,
        table: str,
        credits: Credits,
        *,
        image: str = "image",
        captions: Mapping[str, str] | None = None,
    ) -> None:
        self.table, self.credits, self.image = table, credits, image
        self.captions = dict(captions or {})

    def samples(self) -> Iterator[Sample]:
        """File by file, row by row."""
        fs, root = open_uri(self.table)
        for name, path in self._files(fs, root):
            try:
                with pq.ParquetFile(fs.open_input_file(path)) as file:
                    columns = self._columns(file.schema_arrow, name)
                    yield from self._rows(file, columns, name)
            except pyarrow.lib.ArrowException as error:
                raise DataError(f"{name} cannot be read as Parquet: {error}") from error

    def _files(self, fs: pyarrow.fs.FileSystem, root: str) -> list[tuple[str, str]]:
        """(name, path) of every table."""
        kind = fs.get_file_info(root).type
        if kind == pyarrow.fs.FileType.File:
            return [(PurePosixPath(root).name, root)]
        names = [name for name in list_files(fs, root) if name.endswith(".parquet")]
        if not names:
            raise DataError(f"there is no .parquet file in {self.table}")
        return [(name, f"{root}/{name}") for name in names]

    def _columns(self, schema: pa.Schema, name: str) -> list[str]:
        lacking = [c for c in (self.image, *self.captions) if c not in schema.names]
        if lacking:
            raise DataError(
                f"{name} has no column {', '.join(lacking)}; it has {', '.join(schema.names)}. "
                "Name them with --image and --caption"
            )
        kept = {self.image, *self.captions, *TEXTS, "author"}
        if not self.captions:
            probe = {column: "x" for column in schema.names if column != self.image}
            kept |= {c for c in probe if captions_in({c: "x"}, self.credits.language)}
        return [column for column in schema.names if column in kept]

    def _rows(self, file: pq.ParquetFile, columns: list[str], name: str) -> Iterator[Sample]:
        number = 0
        stem = str(PurePosixPath(name).with_suffix(""))
        for batch in file.iter_batches(BATCH, columns=columns):
            for row in batch.to_pylist():
                image = _picture(row.pop(self.image))
                key = f"{stem}-{number:09d}"
                texts = self.credits.fill(row, group=key)
                yield make_sample(key, image, _extension(image), self._captions(row), texts)
                number += 1

    def _captions(self, row: Mapping[str, Any]) -> list[Caption]:
        if not self.captions:
            return captions_in(row, self.credits.language)
        return [
            caption
            for column, language in self.captions.items()
            for caption in captions_in({"caption": row[column]}, language)
        ]


def _picture(value: Any) -> bytes:
    """The encoded picture of a cell; b"" where there is none."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else b""


def _extension(image: bytes) -> str:
    """By the first bytes, for file names in the shard alone; decoding looks for itself."""
    return next((name for start, name in _SIGNATURES if image.startswith(start)), "jpg")
