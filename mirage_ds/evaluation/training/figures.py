"""The figures of an evaluation in training, which become curves."""

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.latents.arms import OWN
from mirage_ds.evaluation.latents.health import LatentHealth
from mirage_ds.evaluation.scoring import Task


def spread_of(health: LatentHealth) -> dict[str, float]:
    """How far the states of different rows differ: means over the slots; nothing where no slot has two rows."""
    figures = {"row_cosine": health.row_cosine(), "effective_rank": health.effective_rank()}
    return {name: value for name, value in figures.items() if value is not None}


def numbers(answers: dict[str, list[Answer]], task: Task) -> dict[str, float]:
    """The figures of an evaluation: those of the arm `own` by their plain names, others as NAME_ARM."""
    figures = {}
    for name, arm in answers.items():
        suffix = "" if name == OWN else f"_{name}"
        scored = [answer.scores[task.ways[0]].success for answer in arm if answer.scores]
        if scored:
            figures[f"success{suffix}"] = sum(scored) / len(scored)
        figures[f"cut_off{suffix}"] = sum(not answer.complete for answer in arm) / len(arm)
        figures[f"with_blocks{suffix}"] = sum(answer.num_blocks > 0 for answer in arm) / len(arm)
    return figures
