"""The model-independent facts of a sample, for the index. Decodes all its images, so that nothing can fail later."""

from collections.abc import Iterable, Iterator
from typing import Any

from mirage_ds.data.images import decode
from mirage_ds.data.rows import Sample, num_image_blocks, num_latent_blocks


def facts_of(sample: Sample, where: str) -> dict[str, Any]:
    """The index entry of a sample, without its position; decodes all its images.

    Raises:
        DataError: an image cannot be decoded; the message has `where`.
    """
    return {
        "input_sizes": list(_sizes(sample.input_images, f"{where}, image_input")),
        "helper_sizes": list(_sizes(sample.helper_images, f"{where}, image_output")),
        "question_chars": len(sample.text_input),
        "answer_chars": len(sample.text_output),
        "image_blocks": num_image_blocks(sample.text_input, len(sample.input_images)),
        "latent_blocks": num_latent_blocks(sample.text_output, len(sample.helper_images)),
        "latent_sizes": list(sample.latent_sizes) or None,
    }


def _sizes(images: Iterable[bytes], where: str) -> Iterator[tuple[int, int]]:
    for number, data in enumerate(images):
        yield decode(data, f"{where} {number}").size
