"""`mirage-data preview`: rows of a folder of shards as one HTML file."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import count, islice
from pathlib import Path
from typing import Literal

from data_tools.model_options import ModelOptions
from data_tools.sample_rows import Row, as_text, matching_rows, spread_rows
from mirage_ds.data.images import decode
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG
from mirage_ds.data.turns import Turn
from mirage_ds.errors import DataError, name_full_disk, name_unwritable
from mirage_ds.evaluation.report.contents import Picture
from mirage_ds.evaluation.report.html import render_page
from mirage_ds.evaluation.report.pictures import MAX_SIDE_PX, picture

MAX_SHOWN_LATENTS = 16  # of a block; its number stands beside


@dataclass(frozen=True)
class Piece:
    """A part of a question or an answer: its text, or the name of what stands there."""

    kind: Literal["text", "image", "latents"]
    text: str
    num_latents: int = 0

    @property
    def shown_latents(self) -> int:
        return min(self.num_latents, MAX_SHOWN_LATENTS)


@dataclass(frozen=True)
class TurnView:
    """What is shown of a turn."""

    name: str
    is_question: bool
    pieces: list[Piece]


@dataclass(frozen=True)
class RowView:
    """What is shown of a row."""

    number: int
    key: str
    shard: str
    tokens: str  # empty without a model
    turns: Sequence[TurnView]
    inputs: Sequence[Picture]
    helpers: Sequence[Picture]
    fields: Mapping[str, str]


@dataclass(frozen=True)
class Preview:
    """The page."""

    shards: str
    digest: str
    shown: str  # how many rows, and which
    model: str | None
    latent_size: int  # of blocks whose row has none
    date: str
    rows: Sequence[RowView]


def preview(
    path: Path, output: Path, *, rows: int, match: str | None, latent_size: int, options: ModelOptions | None
) -> int:
    """Writes the page; returns the number of rows.

    Args:
        rows: at most so many are shown, spread evenly; with `match` the first that have this text.
        latent_size: K of blocks whose row has none.
        options: tokens are counted with this model.
    Raises:
        MirageError: the shards or the model cannot be read, no row matches, or `output` exists or cannot be written.
    """
    check_new(output)
    folder = load_manifest(path)
    chosen = spread_rows(folder, rows) if match is None else matching_rows(folder, rows, match)
    tokens = [""] * len(chosen) if options is None else _tokens(chosen, options)
    how = "spread evenly" if match is None else f"the first with {match!r} in question or answer"
    page = Preview(
        shards=str(path),
        digest=folder.digest,
        shown=f"{len(chosen)} of {folder.num_samples}, {how}",
        model=options.model if options else None,
        latent_size=latent_size,
        date=datetime.now().strftime("%Y-%m-%d %H:%M"),
        rows=[row_view(row, latent_size, text) for row, text in zip(chosen, tokens, strict=True)],
    )
    html = render_page("data_tools", "preview.html", "preview.js", {}, page=page)
    new = Path(f"{output}.new")
    with name_full_disk(output.parent, "nothing was written; free some space"), name_unwritable(output, "name another"):
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            new.write_text(html, encoding="utf-8")
            new.rename(output)
        finally:
            new.unlink(missing_ok=True)
    return len(chosen)


def check_new(output: Path) -> None:
    """Raises: DataError: the file exists."""
    if output.exists():
        raise DataError(
            f"the output already exists ({output}); expected a new HTML file; name another, or "
            f"delete this one first: rm {output}"
        )


def row_view(row: Row, latent_size: int, tokens: str) -> RowView:
    """What is shown of a row.

    Raises:
        DataError: an image cannot be decoded.
    """
    sample, where = row.sample, f"{row.shard}/{row.entry.key}"
    return RowView(
        number=row.number,
        key=row.entry.key,
        shard=row.shard,
        tokens=tokens,
        turns=turn_views(sample, row.entry.block_sizes(latent_size)),
        inputs=_pictures(sample.input_images, "Input image", f"{where}.input"),
        helpers=_pictures(sample.helper_images, "Helper image", f"{where}.helper"),
        fields={name: as_text(value) for name, value in sample.extra.items()},
    )


def turn_views(sample: Sample, latent_sizes: Sequence[int]) -> list[TurnView]:
    """The turns with their images and latent blocks at their places: those of their tags, or else in front of the first
    question and of the last answer."""
    images = (Piece("image", f"image {number}") for number in count(1))
    blocks = iter([Piece("latents", f"block {n}: K = {k}", k) for n, k in enumerate(latent_sizes, start=1)])
    has_slots = any(IMAGE_TAG in turn.text for turn in sample.turns)
    in_front = [] if has_slots else list(islice(images, len(sample.input_images)))
    views = []
    for turn in sample.turns:
        pieces = in_front if turn.role == "human" else []
        in_front = in_front if turn.role == "system" else []
        for part in re.split(f"({IMAGE_TAG}|{OUTPUT_IMAGE_TAG})", turn.text):
            if part in (IMAGE_TAG, OUTPUT_IMAGE_TAG):
                pieces.append(next(blocks) if turn.train else next(images))
            elif part:
                pieces.append(Piece("text", part))
        views.append(TurnView(_name_of(turn), turn.role != "gpt", pieces))
    views[-1].pieces[:0] = blocks
    return views


def _name_of(turn: Turn) -> str:
    if turn.role == "gpt":
        return "Answer" if turn.train else "Answer, not trained"
    return "Question" if turn.role == "human" else "System"


def _pictures(images: Sequence[bytes], name: str, where: str) -> list[Picture]:
    pictures = []
    for number, data in enumerate(images):
        image = decode(data, f"{where}_{number}")
        alt, size = f"{name} {number + 1}", f"{image.width} x {image.height}"
        scaled = ", scaled down here" if max(image.size) > MAX_SIDE_PX else ""
        pictures.append(picture(image, alt, f"{alt}: {size}{scaled}"))
    return pictures


def _tokens(rows: Sequence[Row], options: ModelOptions) -> list[str]:
    # Imported here, as it imports torch, which takes seconds.
    from data_tools.lengths import open_encoder, row_tokens

    encoder = open_encoder(options)
    found = [row_tokens(encoder, row.sample, row.entry, options.latent_size) for row in rows]
    return [
        f"{each.total} tokens: {each.images} of images, {each.latents} latents, {each.text} of text and markers"
        for each in found
    ]
