"""Commands to look at a folder of shards, and to take rows from it: `stats | preview | head | filter | split`."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from data_tools.conditions import parse_condition
from data_tools.head import head as head_lines
from data_tools.model_options import (
    LATENT_SIZE,
    CacheOption,
    LatentSizeOption,
    MaxPixelsOption,
    MinPixelsOption,
    ModelOption,
    ModelOptions,
    SystemTurnOption,
)
from data_tools.preview import preview as write_preview
from data_tools.selection import filter_rows, parse_fractions, split_rows
from data_tools.stats import describe
from data_tools.stats import stats as measure_stats
from mirage_ds.data.shards import Manifest, load_manifest
from mirage_ds.paths import expanded, local_folder
from mirage_ds.wide_console import wide_console

app = typer.Typer()
ShardsArgument = Annotated[
    Path, typer.Argument(parser=local_folder, metavar="SHARDS", help="A folder that `mirage-data build` wrote.")
]
MaxCountOption = Annotated[int, typer.Option(min=1, help="Maximum samples per shard.")]
MaxSizeOption = Annotated[int, typer.Option(min=1, help="Bytes after which a new shard starts.")]


def checked(
    shards: Path,
    model: str | None,
    latent_size: int,
    min_pixels: int | None,
    max_pixels: int | None,
    system_turn: bool,
    cache_dir: Path | None,
) -> ModelOptions | None:
    """The options for a model, if one is named, after what can be checked without loading anything."""
    load_manifest(shards)
    if model is None:
        return None
    options = ModelOptions(model, latent_size, min_pixels, max_pixels, system_turn, cache_dir)
    options.check()
    return options


@app.command()
@expanded("model")
def stats(
    shards: ShardsArgument,
    model: ModelOption = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    latent_size: LatentSizeOption = LATENT_SIZE,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    system_turn: SystemTurnOption = True,
    cache_dir: CacheOption = None,
) -> None:
    """Prints what is in a folder of shards: rows, images, lengths and, for a model, tokens, patches and costs."""
    options = checked(shards, model, latent_size, min_pixels, max_pixels, system_turn, cache_dir)
    with Console(stderr=True).status("measuring rows"):
        found = measure_stats(shards, options)
    if json_:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        wide_console().print(describe(found))


@app.command()
@expanded("model")
def preview(
    shards: ShardsArgument,
    output: Annotated[Path, typer.Option(help="New HTML file.")],
    rows: Annotated[int, typer.Option(min=1, help="Maximum rows that are shown, spread evenly.")] = 50,
    match: Annotated[str | None, typer.Option(help="The first rows with this text in question or answer.")] = None,
    model: ModelOption = None,
    latent_size: LatentSizeOption = LATENT_SIZE,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    system_turn: SystemTurnOption = True,
    cache_dir: CacheOption = None,
) -> None:
    """Writes one HTML file with rows to look at: texts, images, and where the latents are."""
    options = checked(shards, model, latent_size, min_pixels, max_pixels, system_turn, cache_dir)
    with Console(stderr=True).status("reading rows"):
        num_rows = write_preview(shards, output, rows=rows, match=match, latent_size=latent_size, options=options)
    typer.echo(f"wrote {num_rows} rows to {output}")


@app.command()
@expanded()
def head(
    shards: ShardsArgument,
    number: Annotated[int, typer.Option("-n", min=1, help="Number of rows.")] = 5,
) -> None:
    """Prints the first rows: texts, sizes of images, latent blocks and other fields."""
    for line in head_lines(shards, number):
        typer.echo(line)


@app.command("filter")
@expanded("model")
def filter_(
    shards: ShardsArgument,
    output: Annotated[Path, typer.Option(help="New folder for shards, manifest and index.")],
    where: Annotated[list[str], typer.Option(help="FIELD OPERATOR VALUE, as 'level>=4'; all have to be met.")],
    maxcount: MaxCountOption = 10_000,
    maxsize: MaxSizeOption = 1_000_000_000,
    model: ModelOption = None,
    latent_size: LatentSizeOption = LATENT_SIZE,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    system_turn: SystemTurnOption = True,
    cache_dir: CacheOption = None,
) -> None:
    """Copies the rows that meet conditions to a new folder; no image is built again."""
    conditions = [parse_condition(text) for text in where]
    options = checked(shards, model, latent_size, min_pixels, max_pixels, system_turn, cache_dir)
    with Console(stderr=True).status("copying rows"):
        manifest = filter_rows(shards, output, conditions, options=options, maxcount=maxcount, maxsize=maxsize)
    report(output, manifest)


@app.command()
@expanded("model")
def split(
    shards: ShardsArgument,
    output: Annotated[list[Path], typer.Option(help="New folder; give one for each part.")],
    fractions: Annotated[str | None, typer.Option(help="Of the rows, by hash, as 0.9,0.1.")] = None,
    by: Annotated[str, typer.Option(help="The field that is hashed: rows with equal values stay together.")] = "key",
    seed: Annotated[int, typer.Option(help="Changes the hash.")] = 0,
    where: Annotated[
        list[str] | None, typer.Option(help="As for filter: rows that meet all go to the first of two outputs.")
    ] = None,
    maxcount: MaxCountOption = 10_000,
    maxsize: MaxSizeOption = 1_000_000_000,
    model: ModelOption = None,
    latent_size: LatentSizeOption = LATENT_SIZE,
    min_pixels: MinPixelsOption = None,
    max_pixels: MaxPixelsOption = None,
    system_turn: SystemTurnOption = True,
    cache_dir: CacheOption = None,
) -> None:
    """Copies every row to one of several new folders; no image is built again."""
    options = checked(shards, model, latent_size, min_pixels, max_pixels, system_turn, cache_dir)
    with Console(stderr=True).status("copying rows"):
        manifests = split_rows(
            shards,
            output,
            fractions=[] if fractions is None else parse_fractions(fractions),
            by=by,
            seed=seed,
            conditions=[parse_condition(text) for text in where or []],
            options=options,
            maxcount=maxcount,
            maxsize=maxsize,
        )
    for folder, manifest in zip(output, manifests, strict=True):
        report(folder, manifest)


def report(output: Path, manifest: Manifest) -> None:
    """Prints what was written."""
    typer.echo(f"wrote samples: {manifest.num_samples}, shards: {len(manifest.shards)}, to {output}")
