"""`mirage-data stats`: what is in a folder of shards, from its index; no tar is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from data_tools.distribution import Distribution, distribution
from data_tools.model_options import ModelOptions
from mirage_ds.data.columns import Index
from mirage_ds.data.index import load_index
from mirage_ds.data.shards import ShardFolder, load_manifest

NUM_SIZES = 5  # that are listed
BAR_COLUMNS = 20
UNITS = {"P": 10**15, "T": 10**12, "G": 10**9, "M": 10**6, "k": 10**3}
Numbers = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Measure:
    """What is measured of every row, or of every image."""

    name: str  # in JSON
    title: str
    values: Distribution | None  # None: nothing has it


@dataclass(frozen=True)
class Stats:
    """What is in a folder of shards."""

    shards: str
    digest: str
    num_shards: int
    num_bytes: int
    num_rows: int
    model: str | None
    tokens: str | None  # how the tokens of texts were found
    measures: list[Measure]
    sizes: dict[str, dict[str, int]]  # of input and helper images: "WIDTH x HEIGHT": number, the most frequent first

    def as_json(self) -> dict[str, Any]:
        """For programs: the measures by their names."""
        measures = {each.name: asdict(each.values) if each.values else None for each in self.measures}
        return asdict(self) | {"measures": measures}


def stats(path: Path, options: ModelOptions | None = None) -> Stats:
    """Measures a folder of shards.

    Args:
        options: also measure tokens, patches and costs for a model.
    Raises:
        MirageError: the shards or the model cannot be read.
    """
    folder = load_manifest(path)
    found, sizes = measure_index(load_index(folder))
    source = None
    if options is not None:
        # Imported here, as it imports torch, which takes seconds.
        from data_tools.lengths import measure_lengths

        lengths = measure_lengths(folder, options)
        source = lengths.source
        found["input_patches"] = ("patches of the input images", lengths.input_patches)
        found["helper_patches"] = ("patches of the helper images", lengths.helper_patches)
        found["tokens_text"] = ("tokens, stage text", lengths.tokens["text"])
        found["tokens_latents"] = ("tokens, stages 1 and 2", lengths.tokens["stage1"])
        for stage, costs in lengths.costs.items():
            found[f"cost_{stage}"] = (f"cost in patches, stage {stage.removeprefix('stage')}", costs)
    return Stats(
        shards=str(path),
        digest=folder.digest,
        num_shards=len(folder.manifest.shards),
        num_bytes=num_bytes_of(folder),
        num_rows=folder.num_samples,
        model=options.model if options else None,
        tokens=source,
        measures=[Measure(name, title, distribution(values)) for name, (title, values) in found.items()],
        sizes=sizes,
    )


def num_bytes_of(folder: ShardFolder) -> int:
    """Of all shards."""
    return sum(shard.bytes for shard in folder.manifest.shards)


def measure_index(index: Index) -> tuple[dict[str, tuple[str, Numbers]], dict[str, dict[str, int]]]:
    """What the index knows: by name, a title and the value of each row (or image); and the most frequent sizes."""
    rows = index.samples
    # Of each row the input images come first, then the helper images.
    numbers = np.stack([rows["input_images"], rows["helper_images"]], axis=1).ravel()
    is_helper = np.repeat(np.arange(len(numbers)) % 2 == 1, numbers)
    sizes = {"input": index.images[~is_helper], "helper": index.images[is_helper]}
    pixels = {name: images.astype(np.int64).prod(axis=1) for name, images in sizes.items()}
    found: dict[str, tuple[str, Numbers]] = {
        "question_chars": ("characters of the question", rows["question_chars"]),
        "answer_chars": ("characters of the answer", rows["answer_chars"]),
        "input_images": ("input images", rows["input_images"]),
        "helper_images": ("helper images", rows["helper_images"]),
        "latent_blocks": ("latent blocks", rows["latent_blocks"]),
        "own_latent_size": ("K, of blocks with their own", index.latent_sizes),
        "input_pixels": ("pixels of an input image", pixels["input"]),
        "helper_pixels": ("pixels of a helper image", pixels["helper"]),
        "bytes": ("bytes in the shard", rows["size"]),
    }
    return found, {name: _most_frequent(images) for name, images in sizes.items()}


def _most_frequent(sizes: npt.NDArray[np.int32]) -> dict[str, int]:
    """Args: sizes: [images, 2], width and height."""
    found, counts = np.unique(sizes.astype(np.int64) @ [2**32, 1], return_counts=True)
    most = np.argsort(-counts, kind="stable")[:NUM_SIZES]
    return {
        f"{size >> 32} x {size % 2**32}": count
        for size, count in zip(found[most].tolist(), counts[most].tolist(), strict=True)
    }


def describe(found: Stats) -> RenderableType:
    """For the terminal: a table, and the histograms side by side as far as they fit."""
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for heading in ("min", "median", "95%", "max", "total"):
        table.add_column(heading, justify="right", min_width=5, overflow="fold")  # a number is never cut off
    for measure in found.measures:
        if values := measure.values:
            numbers = (values.min, values.quantiles["50%"], values.quantiles["95%"], values.max, values.total)
            table.add_row(measure.title, *map(_short, numbers))
    # One bar says no more than the table.
    several = [each for each in found.measures if each.values and len(each.values.histogram) > 1]
    histograms = [_bars(each.title, each.values) for each in several if each.values]
    return Group(*_heading(found), "", table, "", Columns(histograms, padding=(1, 3)))


def _heading(found: Stats) -> list[str]:
    lines = [
        f"{escape(found.shards)}: rows: {found.num_rows}, shards: {found.num_shards}, bytes: "
        f"{_short(found.num_bytes)}, digest {found.digest:.12}"
    ]
    for kind, sizes in found.sizes.items():
        listed = ", ".join(f"{size} ({count})" for size, count in sizes.items())
        lines.append(f"most frequent sizes of {kind} images: {listed or 'there are none'}")
    if found.model:
        lines.append(f"tokens of {escape(found.model)}: {found.tokens}")
    return lines


def _bars(title: str, values: Distribution) -> Table:
    table = Table.grid(padding=(0, 1))
    most = max(bar.count for bar in values.histogram)
    for bar in values.histogram:
        label = str(bar.first) if bar.first == bar.last else f"{_short(bar.first)} to {_short(bar.last)}"
        # At least one mark where there is a value at all.
        table.add_row(label, "#" * -(-BAR_COLUMNS * bar.count // most), str(bar.count))
    table.columns[0].justify = "right"
    table.title, table.title_justify = title, "left"
    return table


def _short(number: int) -> str:
    """1234567 -> 1.23M; exact up to five digits, and never longer."""
    if number < 100_000:
        return str(number)
    unit, size = next((unit, size) for unit, size in UNITS.items() if number >= size * 0.9995)
    return f"{number / size:.3g}{unit}"
