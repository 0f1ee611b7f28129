"""One question, answered in the terminal as the answer comes."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TextStreamer

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.images import IMAGE_FORMATS, open_image
from mirage_ds.data.rows import Sample, check_question
from mirage_ds.errors import DataError
from mirage_ds.inference.generate import Decoder, Emission

LATENT_MARK = "\N{BLACK SMALL SQUARE}"


class Terminal(TextStreamer):
    """Writes an answer as it comes: whole words of text, and one mark for each latent."""

    def __init__(self, decoder: Decoder, encoder: Encoder) -> None:
        super().__init__(encoder.tokenizer, skip_special_tokens=True)
        self.ids = decoder.ids
        self.empty = True

    def write(self, emission: Emission) -> None:
        if emission.latent is not None:
            self.on_finalized_text(LATENT_MARK)
        elif emission.token == self.ids.latent_start:
            self.end()  # what is held back until its word is whole
        else:
            self.put(torch.tensor([emission.token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints; the newline that every answer begins with is left out."""
        text = text.lstrip() if self.empty else text
        self.empty = self.empty and not text
        print(text, end="", flush=True)


def read_question(prompt: str, images: Sequence[Path]) -> Sample:
    """The question of a command line.

    Raises:
        DataError: it has no words, an image cannot be read, or its <image> slots do not fit the images.
    """
    if not prompt:
        raise DataError("the question is empty (--prompt); allowed is any text; write what you want to know")
    question = Sample(key="prompt", text_input=prompt, text_output="", input_images=tuple(map(_read, images)))
    check_question(question, "--prompt")
    return question


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the image cannot be read: {error.strerror} (--image {path}); allowed is a file of "
            f"{', '.join(IMAGE_FORMATS)}; mend the path"
        ) from error
    open_image(data, f"--image {path}")
    return data


def answer(decoder: Decoder, encoder: Encoder, question: Sample) -> bool:
    """Decodes one question to the terminal; returns whether the answer ended by itself."""
    terminal, complete = Terminal(decoder, encoder), False
    for (emission,) in decoder.steps(collate([encoder.prompt(question)], align_latents=True)):
        assert emission is not None, "the only row ends with the loop"
        terminal.write(emission)
        complete = bool(decoder.is_end(torch.tensor(emission.token)))
    terminal.end()
    print()
    return complete
