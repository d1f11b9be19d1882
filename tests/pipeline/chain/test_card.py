"""What a model card says of the images: every source, licence and credit."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.chain.card import CREDITS, CREDITS_SHOWN, credits_of, write_card
from pipeline.config import load_recipe
from pipeline.evaluation.measured import COLUMNS, Measured
from pipeline.evaluation.reports import Evaluation
from pipeline.images.pixels import encode_png

NOTO = ("noto@16", "Apache-2.0", "Google")
TWEMOJI = ("twemoji@16", "CC-BY-4.0", "Twitter | contributors")


def pixels(folder: Path, *files: list[tuple[str, str, str]]) -> Path:
    folder.mkdir()
    for number, rows in enumerate(files):
        columns = zip(*rows, strict=True)
        names = ("source", "license", "attribution")
        table = pa.table({n: list(c) for n, c in zip(names, columns, strict=True)})
        pq.write_table(table, folder / f"{number}.parquet")
    return folder


def measured(subject: str) -> Measured:
    """Two images, and one measure of them."""
    image = encode_png(np.zeros((3, 8, 8), np.uint8), {})
    known = {
        "set": "noto/seen", "style": "noto", "split": "seen", "language": "en", "caption": "a dot",
        "words": 2, "image": image, "key": "dot",
    }  # fmt: skip
    rows = pa.table({n: pa.array([known.get(n)] * 2, kind) for n, kind in COLUMNS.items()})
    rows = rows.append_column("imagenet_r1", pa.array([1.0, 0.0]))
    return Measured(subject, rows, {}, "noto", "en")


def test_credits_are_counted_over_all_files(tmp_path: Path) -> None:
    found = credits_of(pixels(tmp_path / "pixels", [NOTO, TWEMOJI, NOTO], [TWEMOJI, NOTO]))
    assert [tuple(row.values()) for row in found.to_pylist()] == [(3, *NOTO), (2, *TWEMOJI)]


def test_the_card_credits_the_most_frequent_and_a_table_everyone(tmp_path: Path) -> None:
    authors = [("flickr", "CC-BY-2.0", f"author {i:02d}") for i in range(CREDITS_SHOWN + 5)]
    folder = pixels(tmp_path / "pixels", [TWEMOJI, TWEMOJI, *authors])
    evaluation = Evaluation.make(
        tmp_path / "evaluation",
        {name: measured(name) for name in ("real", "tokenizer", "candidate")},
        {}, pairs=[], details={}, bootstrap=100, seed=0,
    )  # fmt: skip
    recipe = load_recipe("smoke", ["base=asset:base"], environment={})
    write_card(
        tmp_path, recipe, evaluation, "candidate", [], pixels=folder, seconds={"tokens": 1.0}
    )
    assert Image.open(tmp_path / "samples.png").width > 3 * 8
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 2 | twemoji@16 | CC-BY-4.0 | Twitter \\| contributors |" in text
    assert "author 00" in text and "author 24" not in text
    assert f"all {len(authors) + 1} are in {CREDITS}" in text and "from `asset:base`" in text
    with (tmp_path / CREDITS).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(authors) + 1 and rows[0]["attribution"] == TWEMOJI[2]
