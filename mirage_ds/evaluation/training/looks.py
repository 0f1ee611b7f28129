"""What TensorBoard shows of some answers of an evaluation in training: their text, and one picture each.

The picture has the input images, the helper images, and for each latent a heat map over each input image; below them
are question and answer, and how many images and latents are not shown.
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mirage_ds.data.images import open_image
from mirage_ds.data.rows import Sample
from mirage_ds.data.spread import spread
from mirage_ds.data.turns import as_text
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.latents.heat import heat_maps, overlay
from mirage_ds.evaluation.latents.states import States
from mirage_ds.training.curves import Look

NUM_LOOKS = 3
# TensorBoard shows a picture 350 pixels wide; with more than three tiles side by side no word could be read.
COLUMNS, TILE_PX, GAP_PX, LINE_PX, FONT_PX = 3, 112, 8, 16, 12
WIDTH_PX = COLUMNS * (TILE_PX + GAP_PX) + GAP_PX
MOST_IMAGES = 8  # of each kind
MOST_MAPS = 64  # two blocks of 32 latents; an answer that never ends may have hundreds
MOST_CHARACTERS = 600
LATENT_MARK = "#"  # PIL's own font has no bullet


def looks(engine: Engine, answers: Sequence[Answer], states: States) -> list[Look]:
    """Of some rows, evenly spaced, the same in every evaluation. All weights must be gathered.

    Args:
        answers: those of the arm `own`, in the order of the rows.
        states: the own states of the rows.
    """
    return [look(engine, engine.rows[n], answers[n], states) for n in spread(len(answers), NUM_LOOKS)]


def look(engine: Engine, row: Row, answer: Answer, states: States) -> Look:
    """One row."""
    key = row.sample.key
    made = [state for slot in states.slots(key) if (state := states.at(key, slot)) is not None]
    maps = heat_maps(engine.decoder, engine.encoder, row.sample, made[: most_latents(row.sample)])[:MOST_IMAGES]
    turned = bool(engine.encoder.helper_facts()["exif_orientation"])
    lines = [
        ("not shown", not_shown(row.sample, len(made))),
        ("question", as_text(row.sample.turns[:-1])),
        ("expected", row.sample.text_output),
        ("answer", marked(answer)),
        ("scored", ", ".join(f"{way} {outcome.status}" for way, outcome in answer.scores.items()) or answer.unscored),
    ]
    text = "\n\n".join(f"**{name}**: {' '.join(words.split())}" for name, words in lines if words)
    return Look(text, np.asarray(picture(row.sample, maps, lines, turned=turned)))


def marked(answer: Answer) -> str:
    """An answer's text with a mark for each of its latents."""
    text, places = answer.text, [0, *answer.latents_at, len(answer.text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    return LATENT_MARK.join(pieces)


def most_latents(sample: Sample) -> int:
    """How many latents a picture of the row has room for: each has a heat map over each image."""
    return MOST_MAPS // max(1, len(sample.input_images[:MOST_IMAGES]))


def not_shown(sample: Sample, num_latents: int) -> str:
    """What a picture of the row has no room for, in words; empty: it shows everything."""
    numbers = {
        "input image": len(sample.input_images) - MOST_IMAGES,
        "helper image": len(sample.helper_images) - MOST_IMAGES,
        "latent": num_latents - most_latents(sample),
    }
    return ", ".join(f"{number} more {name}{'s' * (number > 1)}" for name, number in numbers.items() if number > 0)


def picture(
    sample: Sample, maps: Sequence[NDArray[np.float32]], lines: Sequence[tuple[str, str]], *, turned: bool
) -> Image.Image:
    """The tiles of a row, and its lines of text below them.

    Args:
        maps: [latents, rows, columns] over each of the first MOST_IMAGES input images. The colours reach from the
            smallest cosine of all of them to the largest.
        turned: whether images are turned as EXIF says.
    """
    opened = [tile_of(data, sample.key, turned=turned) for data in sample.input_images[:MOST_IMAGES]]
    helpers = [tile_of(data, sample.key, turned=turned) for data in sample.helper_images[:MOST_IMAGES]]
    tiles = [*numbered("input", opened), *numbered("helper", helpers)]
    cosines = [cosine for each in maps for cosine in each.ravel().tolist()]
    low, high = min(cosines, default=0.0), max(cosines, default=0.0)
    for number, of_images in enumerate(zip(*maps, strict=True), start=1):
        for image, each in zip(opened, of_images, strict=True):
            tiles.append((f"{number}: {each.min():.2f} to {each.max():.2f}", overlay(image, each, low, high)))
    wrapped = [
        part
        for name, words in lines
        if words
        for part in textwrap.wrap(f"{name}: {words[:MOST_CHARACTERS]}", width=(WIDTH_PX - 2 * GAP_PX) * 2 // FONT_PX)
    ]
    row_px = LINE_PX + TILE_PX + GAP_PX
    top = -(-len(tiles) // COLUMNS) * row_px + GAP_PX
    canvas = Image.new("RGB", (WIDTH_PX, top + len(wrapped) * LINE_PX + GAP_PX), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT_PX)
    for number, (name, image) in enumerate(tiles):
        row, column = divmod(number, COLUMNS)
        left, above = GAP_PX + column * (TILE_PX + GAP_PX), row * row_px
        draw.text((left, above), name, fill="black", font=font)
        canvas.paste(image, (left, above + LINE_PX))
    for number, part in enumerate(wrapped):
        draw.text((GAP_PX, top + number * LINE_PX), part, fill="black", font=font)
    return canvas


def tile_of(data: bytes, key: str, *, turned: bool) -> Image.Image:
    """An image of the row in the size of a tile."""
    image = open_image(data, key, exif_orientation=turned).convert("RGB")
    return ImageOps.contain(image, (TILE_PX, TILE_PX), Image.Resampling.BICUBIC)


def numbered(name: str, images: Sequence[Image.Image]) -> list[tuple[str, Image.Image]]:
    """Each with its name, and with a number if there are several."""
    return [(name if len(images) == 1 else f"{name} {number}", image) for number, image in enumerate(images, start=1)]
