"""The model card: a README.md in every bundle, on what it is, from what, and how good.

write_card(folder, recipe, evaluation, "candidate", manifests, pixels=pixels, seconds=seconds)
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
import yaml

from pipeline import __version__
from pipeline.config import Recipe
from pipeline.data.preprocess.store import parquet_files
from pipeline.data.shards.manifest import Manifest
from pipeline.evaluation.reports import Evaluation, markdown_table
from pipeline.evaluation.samples import samples_image
from pipeline.runtime import available_cpus, code_commit

TEMPLATE = """# {name}

{description}

Made {date} by Tessera {version} ({commit}) with recipe `{name}` on {hardware}.
Seconds by step: {seconds}.

![real | reconstructed | drawn](samples.png)

## Data

| data set digest | pictures | licences | styles |
|---|---|---|---|
{data}

The pictures keep their licences. Of those that preprocessing accepted, trained on or held out, who
is to be credited{elsewhere}:

| pictures | source | licence | credit |
|---|---|---|---|
{credits}
{base}
## Captions

Read by `{encoder}`, frozen and not part of this bundle.

## Numbers

Measured on {styles}; 95 % bootstrap intervals in brackets.

{table}

## Limits

Draws {size}x{size} pictures in the manner of its training data. It knows nothing that those do not
show; retrieval on unseen concepts above says how far it generalises.

## Recipe

```yaml
{recipe}```
"""

BASE = """
It goes on from `{base}`, whose own card names the data that was made from.
"""
CREDITS, CREDITS_SHOWN = "CREDITS.csv", 20


def write_card(
    folder: Path,
    recipe: Recipe,
    evaluation: Evaluation,
    candidate: str,
    manifests: Sequence[Manifest],
    *,
    pixels: Path,
    seconds: Mapping[str, float],
) -> None:
    """Write README.md, CREDITS.csv and the candidate's first images as samples.png into a folder.

    Args:
        evaluation: of the candidate beside others.
        candidate: the subject in it that the card is about.
        manifests: of the shard sets.
        pixels: the preprocessed images, which name their source, licence and author.
        seconds: of each step of the chain.
    """
    folder.mkdir(parents=True, exist_ok=True)
    credits = credits_of(pixels)
    pa.csv.write_csv(credits, folder / CREDITS)
    columns = {"real": "real", "reconstructed": "tokenizer", "drawn": candidate}
    measured = {title: evaluation.measured(subject) for title, subject in columns.items()}
    samples_image(measured, "seen").save(folder / "samples.png")
    data = "\n".join(
        f"| {m.digest[:16]} | {sum(s.samples for s in m.shards)} | {_counts(m.licenses)} "
        f"| {_counts(m.styles)} |"
        for m in manifests
    )
    text = TEMPLATE.format(
        name=recipe.name,
        description=recipe.description,
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        version=__version__,
        commit=f"commit {commit}" if (commit := code_commit()) else "installed package",
        hardware=hardware(),
        seconds=", ".join(f"{step} {value:.0f}" for step, value in seconds.items()),
        data=data,
        elsewhere=(
            f" (the {CREDITS_SHOWN} most frequent; all {len(credits)} are in {CREDITS})"
            if len(credits) > CREDITS_SHOWN
            else f" (also in {CREDITS})"
        ),
        credits="\n".join(map(_credit, credits.slice(0, CREDITS_SHOWN).to_pylist())),
        base=BASE.format(base=recipe.base) if recipe.base else "",
        encoder=recipe.caption_encoder.model,
        styles=", ".join(recipe.evaluate.styles) or "all styles",
        table=markdown_table(evaluation.reports.values()),
        size=recipe.preprocess.image_size,
        recipe=yaml.safe_dump(
            recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False,
            allow_unicode=True,
        ),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")


def credits_of(pixels: Path) -> pa.Table:
    """Every combination of source, license and attribution with its number of images ("pictures"),
    the most frequent first.

    Memory grows with the number of combinations, not of images.
    """
    names, counts = ["source", "license", "attribution"], []
    for path in parquet_files(pixels):
        table = pq.read_table(path, columns=names)
        counts.append(table.group_by(names).aggregate([([], "count_all")]))
    total = pa.concat_tables(counts).group_by(names).aggregate([("count_all", "sum")])
    total = total.rename_columns([*names, "pictures"])
    by_number = [("pictures", "descending"), *((name, "ascending") for name in names)]
    return total.select(["pictures", *names]).sort_by(by_number)


def _credit(row: Mapping[str, Any]) -> str:
    """A row of the Markdown table, with what would end a cell escaped."""
    cells = (str(value).replace("|", "\\|").replace("\n", " ") for value in row.values())
    return f"| {' | '.join(cells)} |"


def hardware() -> str:
    """The GPUs, else the CPU cores, of this machine, for people to read."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{available_cpus()} CPU cores ({platform.machine()})"


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())
