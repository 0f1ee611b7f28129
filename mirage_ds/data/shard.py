"""One shard of a folder of shards, as its manifest describes it. Needs no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    samples: int
    bytes: int
    sha256: str
