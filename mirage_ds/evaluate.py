"""Decodes a data set's prompts and scores the answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mirage_ds.data.encode import Encoder
from mirage_ds.data.sample import Sample
from mirage_ds.generate import Decoder


@dataclass
class Answer:
    """What the model made of one sample."""

    key: str
    text: str
    num_latents: int  # states that were fed back
    success: bool


def evaluate(
    decoder: Decoder,
    encoder: Encoder,
    samples: Sequence[Sample],
    score: Callable[[Sample, str], bool],
    *,
    batch_size: int = 50,
) -> list[Answer]:
    """Answers every sample's question, greedily, and scores the answers; prompts come from the samples."""
    prompts = [encoder.prompt(sample) for sample in samples]
    answers = []
    for sample, row in zip(samples, decoder.answers(prompts, batch_size), strict=True):
        text = encoder.text_of(row.ids)
        answers.append(Answer(sample.key, text, len(row.latents), score(sample, text)))
    return answers
