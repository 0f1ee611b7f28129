"""Answers one question in the terminal, printing the answer as it is decoded."""

import torch
from transformers import TextStreamer

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import Encoder
from mirage_ds.data.rows import Sample
from mirage_ds.inference.generate import Decoder, Emission

LATENT_MARK = "\N{BLACK SMALL SQUARE}"


class Terminal(TextStreamer):
    """Prints an answer while it is decoded: complete words of text, and one mark per latent."""

    def __init__(self, decoder: Decoder, encoder: Encoder) -> None:
        super().__init__(encoder.tokenizer, skip_special_tokens=True)
        self.ids = decoder.ids
        self.empty = True

    def write(self, emission: Emission) -> None:
        if emission.latent is not None:
            self.on_finalized_text(LATENT_MARK)
        elif emission.token == self.ids.latent_start:
            self.end()  # print the text that TextStreamer holds back until its word is complete
        else:
            self.put(torch.tensor([emission.token]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints, without the newline that every answer starts with."""
        text = text.lstrip() if self.empty else text
        self.empty = self.empty and not text
        print(text, end="", flush=True)


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
