"""What TensorBoard shows of some answers of an evaluation in training: their text, and one picture each.

The picture has the input image, the helper image if the row has one, and a heat map for each latent; below them are
question and answer.
"""

import textwrap
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from mirage_ds.data.images import open_image
from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.answers import Answer, Row
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.latents.heat import heat_maps, overlay
from mirage_ds.evaluation.latents.states import States
from mirage_ds.training.curves import Look
from mirage_ds.training.validation import spread

NUM_LOOKS = 3
# TensorBoard shows a picture 350 pixels wide; with more than three tiles side by side no word could be read.
COLUMNS, TILE_PX, GAP_PX, LINE_PX, FONT_PX = 3, 112, 8, 16, 12
WIDTH_PX = COLUMNS * (TILE_PX + GAP_PX) + GAP_PX
MOST_LATENTS, MOST_CHARACTERS = 8, 600
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
    made = [state for slot in states.slots(key)[:MOST_LATENTS] if (state := states.at(key, slot)) is not None]
    if row.sample.input_images:
        maps = heat_maps(engine.decoder, engine.encoder, row.sample, made)[0]
    else:
        maps = np.zeros((0, 0, 0), np.float32)
    turned = bool(engine.encoder.helper_facts()["exif_orientation"])
    lines = [
        ("question", row.sample.text_input),
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


def picture(
    sample: Sample, maps: NDArray[np.float32], lines: Sequence[tuple[str, str]], *, turned: bool
) -> Image.Image:
    """The tiles of a row, and its lines of text below them.

    Args:
        maps: [latents, rows, columns], over the first input image; [0, 0, 0] without one. The colours reach from the
            smallest cosine of all latents to the largest.
        turned: whether images are turned as EXIF says.
    """
    opened = [open_image(data, sample.key, exif_orientation=turned) for data in sample.input_images[:1]]
    tiles = [("input", image) for image in opened]
    tiles += [("helper", open_image(data, sample.key, exif_orientation=turned)) for data in sample.helper_images[:1]]
    for number, each in enumerate(maps, start=1):
        tiles.append(
            (f"{number}: {each.min():.2f} to {each.max():.2f}", overlay(opened[0], each, maps.min(), maps.max()))
        )
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
        scaled = ImageOps.contain(image.convert("RGB"), (TILE_PX, TILE_PX), Image.Resampling.BICUBIC)
        canvas.paste(scaled, (left, above + LINE_PX))
    for number, part in enumerate(wrapped):
        draw.text((GAP_PX, top + number * LINE_PX), part, fill="black", font=font)
    return canvas
