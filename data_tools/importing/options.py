"""What a user chooses about an import."""

from dataclasses import dataclass

DEFAULT_MARGIN = 0.1


@dataclass(frozen=True)
class Options:
    margin: float = DEFAULT_MARGIN  # around a box, as a part of its width on the left and right, of its height else
    all_turns: bool = False  # a row for each answer of a chat
