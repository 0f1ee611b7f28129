"""The `mirage-data` command: those of this file, of looking.py, and importing_command.py's `import`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data_tools import importing_command, looking, puzzles, vsp
from data_tools.build import build as build_shards
from data_tools.build import val_folder
from data_tools.building.progress import shown
from data_tools.building.rejects import REJECTS_NAME
from data_tools.building.workers import all_cores
from data_tools.check import check as check_shards
from data_tools.parts import build_part, parse_part
from data_tools.parts import merge as merge_parts
from data_tools.upgrade import upgrade as upgrade_folder
from mirage_ds import errors
from mirage_ds.data.shards import Manifest, load_manifest
from mirage_ds.model_folder import check_model
from mirage_ds.paths import expanded, local_folder, to_location, without_secrets

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(importing_command.app)
app.add_typer(looking.app)


class Style(StrEnum):
    """The task of the rows."""

    PLANNING = "planning"
    REASONING = "reasoning"


class PromptLength(StrEnum):
    """The wording of the question."""

    LONG = "long"
    SHORT = "short"


@app.callback()
def root() -> None:
    """Prepares data for mirage_ds, offline."""


@app.command()
@expanded()
def make_vsp(
    output: Annotated[Path, typer.Option(help="New folder for train.jsonl, test.jsonl and images.")],
    num_train: Annotated[int, typer.Option(min=1, help="Number of training rows, each with its own map.")],
    num_test: Annotated[int, typer.Option(min=1, help="Number of test rows; training rows never have their maps.")],
    levels: Annotated[str, typer.Option(help="Cells per side: one size, or a range.")] = "3-6",
    cell_px: Annotated[int, typer.Option(min=8, help="Side of a cell in pixels; 28 gives one token per cell.")] = 64,
    style: Annotated[Style, typer.Option(help="Find a path, or judge a plan.")] = Style.PLANNING,
    prompt: Annotated[PromptLength, typer.Option(help="Wording of the question.")] = PromptLength.LONG,
    seed: Annotated[int, typer.Option(help="Seed of the maps and plans.")] = 0,
) -> None:
    """Generates spatial tasks on FrozenLake maps, with helper images and answers."""
    with Console(stderr=True).status("drawing maps"):
        vsp.make_vsp(
            output,
            levels=vsp.parse_levels(levels),
            num_train=num_train,
            num_test=num_test,
            cell_px=cell_px,
            style=style.value,
            prompt=prompt.value,
            seed=seed,
        )
    typer.echo(f"wrote {counted(num_train, 'training row')} and {counted(num_test, 'test row')} to {output}")


@app.command()
@expanded()
def make_puzzles(
    output: Annotated[Path, typer.Option(help="New folder for train.jsonl, test.jsonl and images.")],
    num_train: Annotated[int, typer.Option(min=1, help="Number of training rows, each with its own puzzle.")],
    num_test: Annotated[int, typer.Option(min=1, help="Number of test rows; no training row has the same pieces.")],
    levels: Annotated[str, typer.Option(help="How hard, from 1 to 4: one level, or a range.")] = "1",
    cell_px: Annotated[int, typer.Option(min=8, help="Side of a cell in pixels; 28 gives one token per cell.")] = 28,
    seed: Annotated[int, typer.Option(help="Seed of the puzzles.")] = 0,
) -> None:
    """Generates puzzles whose answer is seen in a picture that the question does not show."""
    with Console(stderr=True).status("drawing puzzles"):
        puzzles.make_puzzles(
            output,
            levels=vsp.parse_levels(levels, smallest=min(puzzles.LEVELS)),
            num_train=num_train,
            num_test=num_test,
            cell_px=cell_px,
            seed=seed,
        )
    typer.echo(f"wrote {counted(num_train, 'training row')} and {counted(num_test, 'test row')} to {output}")


@app.command()
@expanded()
def build(
    rows: Annotated[
        list[Path],
        typer.Option("--input", help="JSONL or parquet rows; several are read in turn. Images are relative to them."),
    ],
    output: Annotated[Path, typer.Option(help="New folder for shards, manifest and index.")],
    maxcount: Annotated[int, typer.Option(min=1, help="Maximum samples per shard.")] = 10_000,
    maxsize: Annotated[int, typer.Option(min=1, help="Bytes after which a new shard starts.")] = 1_000_000_000,
    max_rejects: Annotated[int, typer.Option(min=0, help="Number of unusable rows to tolerate.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; all cores by default.")] = None,
    shuffle_seed: Annotated[int | None, typer.Option(help="Shuffle the rows of JSONL files first.")] = None,
    val_fraction: Annotated[
        float | None, typer.Option(help="Part of the rows that goes to OUTPUT-val, by the hash of their keys.")
    ] = None,
    part: Annotated[str | None, typer.Option(help="I/N: build only this part, in OUTPUT.part-I-of-N.")] = None,
) -> None:
    """Builds tar shards from rows and images; plain webdataset can read them. Ended early, it continues."""
    limits: dict[str, Any] = {"maxcount": maxcount, "maxsize": maxsize, "max_rejects": max_rejects}
    limits |= {"workers": workers or all_cores(), "shuffle_seed": shuffle_seed}
    if part is not None and val_fraction is not None:
        raise errors.ConfigError(
            f"--val-fraction {val_fraction} with --part {part}: a part has one output; allowed: one of "
            "them; leave one out"
        )
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise errors.ConfigError(
            f"--val-fraction {val_fraction} is no part of the rows; allowed: more than 0 and less than 1; correct it"
        )
    with shown("building shards") as progress:
        if part is None:
            manifest, rejects = build_shards(rows, output, val_fraction=val_fraction, report=progress, **limits)
        else:
            number, count = parse_part(part)
            output, manifest, rejects = build_part(rows, output, number=number, count=count, report=progress, **limits)
    report(output, manifest, rejects)
    if val_fraction is not None and val_folder(output).exists():
        report(val_folder(output), load_manifest(val_folder(output)).manifest, [])
    elif val_fraction is not None:
        typer.echo(f"no row is in the part of {val_fraction} for {val_folder(output)}: there is no such folder")


@app.command()
@expanded()
def merge(
    parts: Annotated[list[Path], typer.Argument(help="All folders that `build --part` wrote, in any order.")],
    output: Annotated[Path, typer.Option(help="New folder for shards, manifest and index.")],
    max_rejects: Annotated[int, typer.Option(min=0, help="Unusable rows to tolerate, in all parts together.")] = 0,
) -> None:
    """Merges the parts of a build into the folder that a single build would write."""
    with Console(stderr=True).status("merging parts"):
        manifest, rejects = merge_parts(parts, output, max_rejects=max_rejects)
    report(output, manifest, rejects)


@app.command()
@expanded()
def upgrade(
    shards: Annotated[
        Path, typer.Argument(parser=local_folder, metavar="SHARDS", help="A folder of shards of format 1.")
    ],
) -> None:
    """Gives a folder of format 1 the index of format 2, which opens at once. Its digest and its shards stay."""
    with Console(stderr=True).status("upgrading the index"):
        manifest = upgrade_folder(shards)
    typer.echo(f"{shards} has format {manifest.format_version}: {counted(manifest.num_samples, 'sample')}")


def report(output: Path, manifest: Manifest, rejects: list[dict[str, Any]]) -> None:
    """Prints what was written."""
    num_bytes = sum(shard.bytes for shard in manifest.shards)
    samples, shards = counted(manifest.num_samples, "sample"), counted(len(manifest.shards), "shard")
    typer.echo(f"wrote {samples} in {shards}, {num_bytes} bytes, to {output}")
    if rejects:
        typer.echo(f"rejected {counted(len(rejects), 'row')}: see {output / REJECTS_NAME}")


def counted(number: int, noun: str) -> str:
    """1, "row" -> "1 row"; 2, "row" -> "2 rows"."""
    return f"{number} {noun if number == 1 else noun + 's'}"


@app.command()
@expanded("shards")
def check(
    shards: Annotated[str, typer.Argument(help="A folder that `mirage-data build` wrote, or its URL.")],
) -> None:
    """Reads a folder of shards and prints all faults. Exit code 1: there are faults; 2: not a folder of shards."""
    num_faults = 0
    with Console(stderr=True).status("checking shards"):
        for fault in check_shards(to_location(shards)):
            num_faults += 1
            typer.echo(fault)
    typer.echo(f"{counted(num_faults, 'fault')} in {without_secrets(shards)}")
    if num_faults:
        raise typer.Exit(1)


@app.command()
@expanded("model")
def count(
    shards: looking.ShardsArgument,
    model: Annotated[str, typer.Option(help="Model folder or hub id, as model.path.")],
    max_length: Annotated[int | None, typer.Option(min=1, help="Say which samples have more tokens.")] = None,
    latent_size: Annotated[int, typer.Option(min=1, help="As model.latent_size.")] = 4,
    min_pixels: Annotated[int | None, typer.Option(min=1, help="As data.min_pixels.")] = None,
    max_pixels: Annotated[int | None, typer.Option(min=1, help="As data.max_pixels.")] = None,
    system_turn: Annotated[bool, typer.Option(help="As data.system_turn.")] = True,
    cache_dir: Annotated[Path | None, typer.Option(help="As model.cache_dir.")] = None,
) -> None:
    """Counts the tokens of every sample for a model, writes them beside the shards, and prints how long they are."""
    load_manifest(shards)
    check_model(model, f"--model {model}")
    # Imported here, as it imports torch, which takes seconds: a wrong path is reported before that.
    from data_tools.count import count as count_tokens

    with Console(stderr=True).status("counting tokens"):
        lines = count_tokens(
            shards,
            model,
            latent_size=latent_size,
            system_turn=system_turn,
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            max_length=max_length,
            cache_dir=cache_dir,
        )
    typer.echo("\n".join(lines))


def main() -> None:
    errors.run(app)
