"""What a user chooses about an import."""

import math
from dataclasses import dataclass

from mirage_ds.errors import ConfigError

DEFAULT_MARGIN = 0.1


@dataclass(frozen=True)
class Options:
    margin: float = DEFAULT_MARGIN  # around a box, as a part of its width on the left and right, of its height else
    all_turns: bool = False  # a row for each answer of a chat

    def __post_init__(self) -> None:
        """
        Raises:
            ConfigError: the margin is no finite number from 0 on.
        """
        if not 0 <= self.margin < math.inf:
            raise ConfigError(f"--margin {self.margin}; allowed: a finite number from 0 on; give for example 0.1")
