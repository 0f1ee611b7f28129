"""`mirage-data head`: rows in the terminal."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from data_tools.sample_rows import Row, as_text, first_rows
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.turns import Role

NAMES: dict[Role, str] = {"system": "system", "human": "question", "gpt": "answer"}


def head(path: Path, count: int) -> Iterator[str]:
    """The first rows, as lines to print.

    Raises:
        DataError: the shards cannot be read.
    """
    for row in first_rows(load_manifest(path), count):
        yield from lines_of(row)


def lines_of(row: Row) -> Iterator[str]:
    """A row: its key and sizes, its questions and answers, and its other fields."""
    entry, sample = row.entry, row.sample
    own = f", K {', '.join(map(str, entry.latent_sizes))}" if entry.latent_sizes else ""
    yield (
        f"{entry.key} ({row.shard}): input images {_sizes(entry.input_sizes)}; helper images "
        f"{_sizes(entry.helper_sizes)}; latent blocks {entry.latent_blocks}{own}"
    )
    for turn in sample.turns:
        name = "answer (not trained)" if turn.role == "gpt" and not turn.train else NAMES[turn.role]
        yield f"  {name + ':':<9} {_in_line(turn.text)}"
    for name, value in sample.extra.items():
        yield f"  {name}: {_in_line(as_text(value))}"


def _sizes(sizes: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{width} x {height}" for width, height in sizes) or "none"


def _in_line(text: str) -> str:
    """In one line, without characters that would act on the terminal."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
