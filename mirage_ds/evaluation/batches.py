"""Which rows are decoded together, and which rank decodes which batch: by length, without decoding an image.

Rows of one length in a batch need no padding. The batches do not depend on the number of ranks, as padding and the
number of rows change the last bits of what a model computes.
"""

from collections.abc import Sequence

from mirage_ds.data.costs import CHARS_PER_TOKEN, MARKERS, TEMPLATE_TOKENS, ImageTokens
from mirage_ds.data.images import header_size
from mirage_ds.data.rows import Sample
from mirage_ds.data.turns import TURN_CHARS
from mirage_ds.evaluation.answers import Row

Batch = tuple[Row, ...]


def question_tokens(sample: Sample, image_tokens: ImageTokens) -> int:
    """The length of a question and its context: image tokens from the sizes in the images' headers, text estimated as
    in training."""
    images = image_tokens([header_size(image) for image in sample.input_images]).tolist()
    context = sum(len(turn.text) + TURN_CHARS for turn in sample.context)
    text = -(-(context + len(sample.text_input)) // CHARS_PER_TOKEN)
    return TEMPLATE_TOKENS + text + sum(images) + MARKERS * len(images)


def cut(rows: Sequence[Row], lengths: Sequence[int], size: int) -> list[Batch]:
    """The rows in batches of this size, the longest first: what needs most memory comes first."""
    order = sorted(range(len(rows)), key=lambda place: (-lengths[place], place))
    return [tuple(rows[place] for place in order[start : start + size]) for start in range(0, len(order), size)]


def deal(costs: Sequence[int], num_ranks: int) -> list[list[int]]:
    """The numbers of the units of each rank: the costliest first, to the ranks forward, then backward, and so on.

    Every rank gets as many as the others, or one less, so that they also make equally many steps.
    """
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for place, unit in enumerate(sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit))):
        turn, rank = divmod(place, num_ranks)
        dealt[rank if turn % 2 == 0 else num_ranks - 1 - rank].append(unit)
    return dealt
