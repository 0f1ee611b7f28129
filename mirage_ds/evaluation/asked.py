"""What a command line of `mirage evaluate` asks for, checked as far as it can be before a model is loaded. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.groups import check_groups
from mirage_ds.evaluation.latents.arms import Arm, parse_arms
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import Task, load_task, unscorable
from mirage_ds.inference.options import Decoding
from mirage_ds.model_folder import check_model


@dataclass(frozen=True)
class Request:
    """The options that say what is asked, as typed; `Decoding` has those that say how it is answered."""

    task: str
    data: Path
    output: Path
    latents: str
    image: str
    by: str | None = None
    limit: int | None = None
    samples: int = 1
    batch_size: int = 16

    def settings(self) -> dict[str, Any]:
        """Those that decide the answers of an arm, as JSON values. The task decides the scores only."""
        return {"data": str(self.data), "limit": self.limit, "samples": self.samples, "batch_size": self.batch_size}


@dataclass(frozen=True)
class Asked:
    """The rows of a file, what is asked of the model, and where the results go."""

    request: Request
    results: Results
    task: Task
    arms: list[Arm]
    rows: list[Row]
    unscored: list[tuple[Row, str]]  # rows that cannot be scored, and why

    @property
    def num_answers(self) -> int:
        return len(self.rows) * len(self.arms) * self.request.samples

    def in_words(self) -> str:
        """How much there is to do."""
        names = ", ".join(arm.name for arm in self.arms)
        return f"rows: {len(self.rows)}, of which {len(self.unscored)} cannot be scored; arms: {names}"


def check_options(request: Request, decoding: Decoding, *, helpers: bool = False, check_images: bool = True) -> Asked:
    """Reads the rows.

    Args:
        helpers: read the rows' helper images even if no arm needs them.
        check_images: decode all images once; one process of several is enough.

    Raises:
        ConfigError: the model, the task, the arms or the field do not exist, or all samples of a row would be the same.
        DataError: the output exists or cannot be written, a row cannot be asked, or none can be scored.
    """
    check_model(decoding.model, f"--model {decoding.model}")
    results = Results(request.output)
    if request.samples > 1 and decoding.temperature == 0:
        raise ConfigError(
            f"greedy decoding gives one answer to a row (--samples {request.samples} with --temperature 0); more need "
            "a temperature above 0; set for example --temperature 0.7, or remove --samples"
        )
    task, arms = load_task(request.task), parse_arms(request.latents, request.image)
    rows = read_questions_of(request.data, arms, request.limit, helpers=helpers, check_images=check_images)
    check_groups([row.sample.extra for row in rows], request.by)
    return Asked(request, results, task, arms, rows, unscorable(rows, task))
