"""`tessera ingest SOURCE` and `tessera data ...`: one function a command, each over jobs/."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer

from jobs.options import DEFAULT_HOME, AsJson, Debug, Home, Overrides, RecipeName

if TYPE_CHECKING:
    from pipeline.contracts import Source
    from pipeline.records import Credits
    from pipeline.shards import Manifest

ingest_app = typer.Typer(no_args_is_help=True, help="Captioned pictures from a source into shards.")
data_app = typer.Typer(no_args_is_help=True, help="Check shard sets and look at them.")

Out = Annotated[str, typer.Option("--out", help="Directory, URI (s3://, gs://) or home:NAME.")]
License = Annotated[
    str,
    typer.Option(
        "--license",
        help="SPDX identifier of the pictures that name none; NOASSERTION if unknown.",
    ),
]
Style = Annotated[
    str, typer.Option("--style", help="Of the pictures that name none: who drew them, or how.")
]
SourceName = Annotated[
    str | None, typer.Option("--source", help="Where the pictures come from. Default: the path.")
]
Attribution = Annotated[str, typer.Option("--attribution", help="The credit the licence asks for.")]
Language = Annotated[str, typer.Option("--language", help="Of captions that name none, BCP 47.")]
ShardMb = Annotated[float, typer.Option("--shard-mb", min=0.1, help="Size of a shard, in MB.")]
Folder = Annotated[str, typer.Argument(help="A directory or URI.")]


@ingest_app.command("emoji")
def ingest_emoji(
    out: Out = "home:emoji",
    vendor: Annotated[
        list[str] | None, typer.Option(help="noto, twemoji, fluent, openmoji.")
    ] = None,
    language: Annotated[list[str] | None, typer.Option(help="Caption languages.")] = None,
    skin_tones: Annotated[bool, typer.Option(help="Skin-tone variants too.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="All vendors, with skin tones.")
    ] = False,
    compress: Annotated[bool, typer.Option("--compress", help="Gzip the shards.")] = False,
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Openly licensed emoji with English and Chinese captions, fetched with npm."""
    from jobs.ingest import ingest_emoji as run
    from pipeline.shards import locate
    from pipeline.sources.emoji import SHIPPED_VENDORS, VENDORS

    vendors = tuple(VENDORS) if everything else tuple(vendor or SHIPPED_VENDORS)
    target = locate(out, home)
    manifest = run(
        target, cache=home / "downloads", vendors=vendors,
        languages=tuple(language or ("en", "zh")), skin_tones=skin_tones or everything,
        max_shard_bytes=_bytes(shard_mb), compress=compress,
    )  # fmt: skip
    _tell(manifest, target, as_json)


def _write(source: Source, out: str, home: Path, shard_mb: float, as_json: bool) -> None:
    from pipeline.shard_writer import write_shards
    from pipeline.shards import locate

    target = locate(out, home)
    manifest = write_shards(source.samples(), target, max_bytes=_bytes(shard_mb))
    _tell(manifest, target, as_json)


def _bytes(megabytes: float) -> int:
    return round(megabytes * 1_000_000)


def _tell(manifest: Manifest, target: str, as_json: bool) -> None:
    typer.echo(manifest.model_dump_json() if as_json else target)


def _credits(
    license: str, style: str, source: str | None, attribution: str, language: str, path: str
) -> Credits:
    from pipeline.records import Credits

    return Credits(
        license=license,
        style=style,
        source=source or _name_of(path),
        attribution=attribution,
        language=language,
    )


def _name_of(path: str) -> str:
    """The last part of a path or URI, whose endpoint and credentials are nobody's to know."""
    parts = urlsplit(path) if "://" in path else None
    place = path if parts is None else f"{parts.hostname or ''}{parts.path}"
    return place.rstrip("/").rpartition("/")[2] or place


@ingest_app.command("folder")
def ingest_folder(
    folder: Folder,
    license: License,
    out: Out,
    style: Style = "photo",
    source: SourceName = None,
    attribution: Attribution = "",
    language: Language = "en",
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Pictures beside .txt captions, or with a captions.jsonl, .csv or .parquet."""
    from pipeline.sources.folder import FolderSource

    credits = _credits(license, style, source, attribution, language, folder)
    _write(FolderSource(folder, credits), out, home, shard_mb, as_json)


@ingest_app.command("unlabelled")
def ingest_unlabelled(
    folder: Folder,
    license: License,
    out: Out,
    style: Style = "photo",
    source: SourceName = None,
    attribution: Attribution = "",
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Pictures without captions, for the tokenizer (preprocess.require_captions=false)."""
    from pipeline.sources.unlabelled import UnlabelledSource

    credits = _credits(license, style, source, attribution, "en", folder)
    _write(UnlabelledSource(folder, credits), out, home, shard_mb, as_json)


@ingest_app.command("coco")
def ingest_coco(
    annotations: Annotated[str, typer.Argument(help="captions_train2017.json or the like.")],
    images: Annotated[str, typer.Argument(help="The folder its file names are in.")],
    out: Out,
    license: License = "NOASSERTION",
    style: Style = "photo",
    source: SourceName = None,
    attribution: Attribution = "",
    language: Language = "en",
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """A COCO captions file of the 2014 or 2017 layout; licences are the file's own."""
    from pipeline.sources.coco import CocoSource

    credits = _credits(license, style, source, attribution, language, annotations)
    _write(CocoSource(annotations, images, credits), out, home, shard_mb, as_json)


@ingest_app.command("parquet")
def ingest_parquet(
    table: Annotated[str, typer.Argument(help="A .parquet file or a folder of them.")],
    license: License,
    out: Out,
    image: Annotated[str, typer.Option(help="The picture's column.")] = "image",
    caption: Annotated[
        list[str] | None,
        typer.Option(help="A caption column, with its language: text, or text_zh:zh."),
    ] = None,
    style: Style = "photo",
    source: SourceName = None,
    attribution: Attribution = "",
    language: Language = "en",
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Hugging Face style Parquet: pictures embedded, captions in columns."""
    from pipeline.sources.parquet import ParquetSource

    columns = [name.partition(":") for name in caption or ()]
    captions = {name: tongue or language for name, _, tongue in columns}
    credits = _credits(license, style, source, attribution, language, table)
    _write(
        ParquetSource(table, credits, image=image, captions=captions), out, home, shard_mb, as_json
    )


@ingest_app.command("webdataset")
def ingest_webdataset(
    folder: Annotated[str, typer.Argument(help="A directory or URI with .tar files.")],
    license: License,
    out: Out,
    copy: Annotated[
        bool, typer.Option("--copy", help="Rewrite the pictures as shards of our own.")
    ] = False,
    style: Style = "photo",
    source: SourceName = None,
    attribution: Attribution = "",
    language: Language = "en",
    shard_mb: ShardMb = 256,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Existing tars, img2dataset's included, read where they are: only a manifest is written."""
    from pipeline.shard_writer import write_index
    from pipeline.shards import locate
    from pipeline.sources.webdataset import WebDatasetSource, same_folder

    credits = _credits(license, style, source, attribution, language, folder)
    tars = WebDatasetSource(folder, credits)
    if copy:
        _write(tars, out, home, shard_mb, as_json)
        return
    target = locate(out, home)
    manifest = tars.index(here=same_folder(folder, target))
    write_index(manifest, target)
    _tell(manifest, target, as_json)


Uri = Annotated[str, typer.Argument(help="A shard set: directory, URI, asset:NAME or home:NAME.")]


@data_app.command("verify")
def data_verify(
    uri: Uri, home: Home = DEFAULT_HOME, as_json: AsJson = False, debug: Debug = False
) -> None:
    """Read every byte; name each missing, truncated, altered or surplus shard. Exits with 1."""
    from pipeline.shards import locate, read_manifest, verify

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
    out: Annotated[Path, typer.Option(help="The contact sheet to write.")] = Path("sheet.png"),
    count: Annotated[int, typer.Option(min=1, max=1000, help="Pictures on it.")] = 48,
    home: Home = DEFAULT_HOME,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Count what a set holds, and draw some of its pictures with their captions."""
    from jobs.data import contact_sheet
    from pipeline.shards import locate

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
        typer.echo(json.dumps({**counts, "sheet": str(out)}, ensure_ascii=False))
        return
    for name, value in counts.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        typer.echo(f"{name:<10} {shown}")
    typer.echo(str(out))


@data_app.command("augment")
def data_augment(
    recipe: RecipeName,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="The picture grid to write.")] = Path("augment.png"),
    count: Annotated[int, typer.Option(min=2, max=64, help="Pictures a row.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Of the random changes.")] = 0,
    home: Home = DEFAULT_HOME,
    debug: Debug = False,
) -> None:
    """Show what every augmentation does to a recipe's pictures, and what its sections do."""
    from jobs.data import augmentation_grid
    from pipeline.config import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    augmentation_grid(loaded, home, out, count=count, seed=seed)
    typer.echo(str(out))
