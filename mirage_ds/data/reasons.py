"""Why samples cannot be used: how many, and the first of them."""

from dataclasses import dataclass, field

NUM_LISTED = 5


@dataclass
class Reason:
    """One reason, as a line of a message; false as long as no sample has it."""

    what: str
    remedy: str  # what is allowed, and what to do
    count: int = 0
    examples: list[str] = field(default_factory=list)  # the first NUM_LISTED, each with its sample

    @property
    def num_missing(self) -> int:
        """Examples that there is still room for."""
        return NUM_LISTED - len(self.examples)

    def __bool__(self) -> bool:
        return self.count > 0

    def __str__(self) -> str:
        more = f" and {self.count - len(self.examples)} more" if self.count > len(self.examples) else ""
        return f"{self.what}: {self.count}: {', '.join(self.examples)}{more}; {self.remedy}"
