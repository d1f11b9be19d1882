"""`tessera data ...`: one function per command, each over jobs/data.py."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import DEFAULT_HOME, AsJson, Debug, Home, Overrides, RecipeName

data_app = typer.Typer(no_args_is_help=True, help="Check shard sets and look at them.")

Uri = Annotated[
    str,
    typer.Argument(
        help="A shard set: a directory, a URI (s3://, gs://), asset:NAME for one that ships with "
        "Tessera, or home:NAME for HOME/shards/NAME."
    ),
]


@data_app.command("verify")
def data_verify(
    uri: Uri, home: Home = DEFAULT_HOME, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Read every byte of a shard set; name each missing, truncated, altered or surplus shard.

    Exits with 1 if there is one.
    """
    from pipeline.data.shards.manifest import locate, read_manifest, verify

    target = locate(uri, home)
    problems = verify(target)
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(problem) for problem in problems]))
    else:
        manifest = read_manifest(target)
        for problem in problems:
            typer.echo(str(problem))
        if not problems:
            typer.echo(f"{len(manifest.shards)} shards, {manifest.samples} samples: all whole")
    if problems:
        raise typer.Exit(1)


@data_app.command("show")
def data_show(
    uri: Uri,
    out: Annotated[Path, typer.Option(help="Contact sheet to write: .png, .jpg or .webp.")] = Path(
        "sheet.png"
    ),
    count: Annotated[
        int, typer.Option(min=1, max=1000, help="Number of pictures on the sheet.")
    ] = 48,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count what a shard set holds, and draw some of its pictures with their captions."""
    from jobs.data import contact_sheet
    from pipeline.data.shards.manifest import locate

    manifest = contact_sheet(locate(uri, home), out, count=count)
    counts = {
        "samples": manifest.samples,
        "groups": manifest.groups,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bytes for shard in manifest.shards),
        "digest": manifest.digest,
        **{
            name: getattr(manifest, name) for name in ("styles", "licenses", "sources", "languages")
        },
    }
    if as_json:
        losses = [loss.model_dump() for loss in manifest.losses]
        told = {**counts, "losses": losses, "sheet": str(out)}
        typer.echo(json.dumps(told, ensure_ascii=False))
        return
    for name, value in counts.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        typer.echo(f"{name:<10} {shown}")
    for loss in manifest.losses:
        typer.echo(f"{'left out':<10} {loss.of} {loss.reason} {loss.count}: {loss.example}")
    typer.echo(str(out))


@data_app.command("augment")
def data_augment(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="Picture grid to write: .png, .jpg or .webp.")] = Path(
        "augment.png"
    ),
    count: Annotated[int, typer.Option(min=2, max=64, help="Pictures per row.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random changes.")] = 0,
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Draw what every augmentation does to a recipe's pictures: one row per augmentation.

    Below them one row per section of the recipe shows what its own settings do.
    """
    from jobs.data import augmentation_grid
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    augmentation_grid(loaded, home, out, count=count, seed=seed)
    typer.echo(str(out))
