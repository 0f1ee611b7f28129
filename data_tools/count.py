"""Counts the tokens of every sample for one model. The only tool here that needs a model, and with it torch."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from mirage_ds.config import Stage
from mirage_ds.data.columns import Index
from mirage_ds.data.costs import SampleCosts
from mirage_ds.data.counts import count_texts, save_counts
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.index import load_index
from mirage_ds.data.shards import ShardFolder, load_manifest

NUM_LISTED = 5


def count(
    shards: Path,
    model: str,
    *,
    latent_size: int,
    system_turn: bool,
    min_pixels: int | None,
    max_pixels: int | None,
    max_length: int | None,
    cache_dir: Path | None,
) -> list[str]:
    """Writes the counts beside the shards; returns what was found, as lines to print.

    Args:
        latent_size, system_turn, min_pixels, max_pixels, max_length, cache_dir: as in a recipe.
    Raises:
        MirageError: the shards or the model cannot be read, or the folder of shards cannot be written.
    """
    folder = load_manifest(shards)
    encoder = load_encoder(
        model,
        stage="stage1",
        latent_size=latent_size,
        system_turn=system_turn,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        cache_dir=cache_dir,
    )
    counts = count_texts(folder, encoder.tokenizer, system_turn=system_turn)
    lines = [f"wrote {save_counts(folder, encoder.tokenizer, counts, system_turn=system_turn)}"]
    index = load_index(folder)
    groups: dict[str, tuple[Stage, str]] = {
        "text": ("text", "without_latents"),
        "stage1 and stage2": ("stage1", "with_latents"),
    }
    for stages, (stage, name) in groups.items():
        costs = SampleCosts(index, encoder.image_tokens, stage, latent_size, texts=counts[name])
        lines.append(describe(stages, costs.all().tokens, folder, index, max_length))
    return lines


def describe(
    stages: str, lengths: npt.NDArray[np.int64], folder: ShardFolder, index: Index, max_length: int | None
) -> str:
    """One line: the distribution of the lengths, and which of them are over the limit."""
    least, middle, most = lengths.min(), np.median(lengths), lengths.max()
    line = (
        f"{stages}: tokens of a sample: min {least}, median {middle:g}, 95th percentile "
        f"{np.quantile(lengths, 0.95, method='higher')}, max {most}"
    )
    if max_length is None:
        return line
    over = np.flatnonzero(lengths > max_length)
    some = zip(index.take(over[:NUM_LISTED]).entries(), lengths[over[:NUM_LISTED]].tolist(), strict=True)
    listed = ", ".join(
        f"{folder.manifest.shards[entry.shard].name}/{entry.key} with {length}" for entry, length in some
    )
    more = ", ..." if len(over) > NUM_LISTED else ""
    return f"{line}; over {max_length}: {len(over)}" + (f" ({listed}{more})" if len(over) else "")
