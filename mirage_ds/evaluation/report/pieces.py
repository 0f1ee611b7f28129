"""The text of an answer in pieces: where its latents are, and what a replacement changed."""

import difflib
import re
from collections.abc import Mapping

from mirage_ds.evaluation.report.contents import Piece


def own_pieces(text: str, latents_at: Mapping[str, int]) -> list[Piece]:
    """A text with a piece for each latent.

    Args:
        latents_at: of each latent, by its slot, the number of characters before it.
    """
    pieces, done = [], 0
    for slot, place in latents_at.items():
        if place > done:
            pieces.append(Piece("same", text[done:place]))
        pieces.append(Piece("latent", slot))
        done = max(done, place)
    return [*pieces, Piece("same", text[done:])] if done < len(text) else pieces


def changed_pieces(old: str, new: str) -> list[Piece]:
    """A new text, with what is new in it and what is gone, word by word."""
    before, after = (re.findall(r"\s+|\w+|[^\w\s]", text) for text in (old, new))
    pieces = []
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, before, after, False).get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(after[new_start:new_end])))
            continue
        if end > start:
            pieces.append(Piece("removed", "".join(before[start:end])))
        if new_end > new_start:
            pieces.append(Piece("added", "".join(after[new_start:new_end])))
    return pieces
