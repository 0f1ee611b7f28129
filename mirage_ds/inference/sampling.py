"""How a token is chosen: the likeliest, or a random draw from the likeliest."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mirage_ds.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen. A row's draws depend only on the seed and its key, not on its batch."""

    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw from the smallest set of likeliest tokens whose probabilities sum to at least this."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature} with top-p {self.top_p} (sampling); expected a finite temperature "
                "of at least 0 and 0 < top-p <= 1; for example 0.7 and 0.9, or temperature 0 for greedy decoding"
            )

    def generator(self, key: str) -> torch.Generator:
        """The random number generator of one row."""
        digest = hashlib.sha256(f"{self.seed}/{key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))

    def choose(self, logits: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """Logits [B, V] -> token ids [B] on the CPU."""
        if self.temperature == 0:
            return logits.argmax(dim=-1).cpu()
        # The largest logit becomes 0 before the division, so that no temperature can overflow.
        logits = logits.double() - logits.amax(dim=-1, keepdim=True)
        likely, ids = (logits / self.temperature).softmax(dim=-1).sort(dim=-1, descending=True)
        cumulative = likely.cumsum(dim=-1)
        likely = likely.masked_fill(cumulative - likely >= self.top_p, 0)  # always keeps the likeliest
        cumulative = likely.cumsum(dim=-1)
        draws = torch.cat([torch.rand(1, generator=generator, dtype=torch.float64) for generator in generators])
        places = torch.searchsorted(cumulative, draws.to(logits.device)[:, None] * cumulative[:, -1:], right=True)
        return ids.gather(1, places).flatten().cpu()


GREEDY = Sampling()
