"""The model-independent facts of a sample, for the index. Decodes all its images, so that nothing can fail later."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from mirage_ds.data.images import decode
from mirage_ds.data.rows import Sample, num_early_image_blocks, num_latent_blocks
from mirage_ds.data.turns import TURN_CHARS


def facts_of(sample: Sample, row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The index entry of a sample, without its position; decodes all its images.

    Args:
        row: that the sample was read from, with the paths of its images; of a shard's sample empty.
    Raises:
        DataError: an image cannot be decoded; the message has `where` and the image's path.
    """
    return {
        "input_sizes": list(_sizes(sample.input_images, row, "image_input", where)),
        "helper_sizes": list(_sizes(sample.helper_images, row, "image_output", where)),
        "question_chars": _chars(sample, trained=False) + TURN_CHARS * len(sample.context),
        "answer_chars": _chars(sample, trained=True),
        "image_blocks": num_early_image_blocks(sample),
        "latent_blocks": num_latent_blocks(sample),
        "latent_sizes": list(sample.latent_sizes) or None,
    }


def _chars(sample: Sample, *, trained: bool) -> int:
    return sum(len(turn.text) for turn in sample.turns if turn.train == trained)


def _sizes(images: Iterable[bytes], row: Mapping[str, Any], name: str, where: str) -> Iterator[tuple[int, int]]:
    for number, data in enumerate(images):
        yield decode(data, f"{where}, {name} {number}{_path_in(row.get(name), number)}").size


def _path_in(value: Any, number: int) -> str:
    """`: PATH` of an image of a row's field; of one that is in the row itself nothing."""
    image = value[number] if isinstance(value, list) else value
    if isinstance(image, dict):
        image = image.get("path")
    return f": {image:.200}" if isinstance(image, str) and not image.startswith("data:") else ""
