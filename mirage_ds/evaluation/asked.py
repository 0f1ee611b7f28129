"""What a command line of `mirage evaluate` asks for, checked as far as it can be before a model is loaded. No torch."""

from dataclasses import dataclass
from pathlib import Path

from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.groups import check_groups
from mirage_ds.evaluation.latents.arms import Arm, parse_arms
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.results import Results
from mirage_ds.evaluation.scoring import Task, load_task, unscorable
from mirage_ds.model_folder import check_model


@dataclass(frozen=True)
class Asked:
    """The rows of a file, what is asked of the model, and where the results go."""

    results: Results
    task: Task
    arms: list[Arm]
    rows: list[Row]
    unscored: list[tuple[Row, str]]  # rows that cannot be scored, and why
    samples: int  # answers to a row in each arm

    @property
    def num_answers(self) -> int:
        return len(self.rows) * len(self.arms) * self.samples


def check_options(
    model: str,
    task: str,
    data: Path,
    output: Path,
    *,
    latents: str,
    image: str,
    by: str | None,
    limit: int | None,
    samples: int,
    temperature: float,
    helpers: bool = False,
    check_images: bool = True,
) -> Asked:
    """Reads the rows. The arguments are options of the command.

    Args:
        helpers: read the rows' helper images even if no arm needs them.
        check_images: decode all images once; one process of several is enough.

    Raises:
        ConfigError: the model, the task, the arms or the field do not exist, or all samples of a row would be the same.
        DataError: the output exists or cannot be written, a row cannot be asked, or none can be scored.
    """
    check_model(model, f"--model {model}")
    results = Results(output)
    if samples > 1 and temperature == 0:
        raise ConfigError(
            f"greedy decoding gives one answer to a row (--samples {samples} with --temperature 0); more need a "
            "temperature above 0; set for example --temperature 0.7, or remove --samples"
        )
    chosen, arms = load_task(task), parse_arms(latents, image)
    rows = read_questions_of(data, arms, limit, helpers=helpers, check_images=check_images)
    check_groups([row.sample.extra for row in rows], by)
    return Asked(results, chosen, arms, rows, unscorable(rows, chosen), samples)
