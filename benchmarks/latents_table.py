"""The tables of do_latents_matter.py: rates and paired differences, with intervals over seeds and rows.

Every seed answers the same rows, so what was solved is a table of seeds x rows, and a rate is the mean of it. A
bootstrap draws seeds with replacement and, for each of these draws, rows with replacement, the same rows for all its
seeds; the interval is from the 2.5% to the 97.5% quantile of NUM_DRAWS means. So it covers other random models and
orders of samples, as far as the few seeds show them, and other rows of the same kind. It does not cover other training
rows, sizes of model or tasks. With 3 seeds it is too short for what seeds do: the spread of n drawn seeds is on average
sqrt((n - 1) / n) of the real one. The two sides of a difference are drawn together: same seed, same row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

OWN = "own"
NUM_DRAWS = 10_000
LABELS = {
    "text": "text, same samples",
    "text_seconds": "text, same seconds",
    "latents": "stage 1 + stage 2",
    "gray": "gray helper images",
    "input": "the input image as helper",
    "unseen_image": "answer does not see the image",
}

NOTE_ON_NONE = (
    "With `none` no block comes, and images are hidden only after a block. So in the arm "
    f"`{LABELS['unseen_image']}` they stay visible there: own minus none compares hidden with visible images."
)


@dataclass
class Replaced:
    """The answers of one arm with one replacement of its latents."""

    solved: list[list[bool]] = field(default_factory=list)  # [seeds][rows]
    num_cut_off: int = 0  # answers of all seeds that never ended

    @property
    def values(self) -> np.ndarray:
        """[seeds, rows], 1 where a row was solved."""
        return np.array(self.solved, dtype=float)


Answers = dict[str, dict[str, Replaced]]
"""{arm: {what was fed at the latents: its answers}}"""


def rates(answers: Answers) -> dict[str, dict[str, list[float]]]:
    """The share of rows that each seed solved."""
    return {
        arm: {latents: replaced.values.mean(axis=1).tolist() for latents, replaced in by_latents.items()}
        for arm, by_latents in answers.items()
    }


def interval(values: np.ndarray) -> tuple[float, float]:
    """The 95% interval of the mean of [seeds, rows] values."""
    random = np.random.default_rng(0)
    num_seeds, num_rows = values.shape
    means = []
    for _ in range(NUM_DRAWS):
        seeds = random.integers(num_seeds, size=num_seeds)
        rows = random.integers(num_rows, size=num_rows)
        # The mean over the drawn seeds first: it is [rows], and cheap to draw from.
        means.append(values[seeds].mean(axis=0)[rows].mean())
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def arms_table(answers: Answers, training: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Markdown, a line for each arm: how much it was trained, its rate, and the difference to text on equal samples."""
    head = ("arm", "samples", "minutes", "solved", "95% interval", "by seed", "minus text", "95% interval")
    lines = _head(head)
    text = answers["text"][OWN].values
    for arm, by_latents in answers.items():
        own = by_latents[OWN].values
        by_seed = ", ".join(f"{rate:.1%}" for rate in own.mean(axis=1))
        cells = [LABELS[arm], f"{training[arm]['samples']:.0f}", f"{training[arm]['minutes']:.1f}"]
        cells += [f"{own.mean():.1%}", _span(own, "{:.1%}"), by_seed]
        cells += ["", ""] if arm == "text" else [_points(own - text), _span(own - text, "{:+.1f}", 100)]
        lines.append(_line(cells))
    return lines


def latents_table(answers: Answers, stage1: Answers) -> list[str]:
    """Markdown, a line for each replacement: the rate of each arm, own states minus it, and answers without an end.

    Args:
        answers: after all stages.
        stage1: of the same arms after stage 1, for the last lines.
    """
    arms = list(stage1)
    lines = _head(("fed at the latents", *(LABELS[arm] for arm in arms)))
    for found, note in ((answers, ""), (stage1, ", after stage 1 alone")):
        for latents in found[arms[0]]:
            lines.append(_line([latents + note, *(_cell(found[arm], latents) for arm in arms)]))
    return lines if "unseen_image" not in arms else [*lines, "", NOTE_ON_NONE]


def _cell(by_latents: Mapping[str, Replaced], latents: str) -> str:
    replaced = by_latents[latents]
    worth = by_latents[OWN].values - replaced.values
    notes = [] if latents == OWN else [f"{_points(worth)}: {_span(worth, '{:+.1f}', 100)}"]
    notes += [f"{replaced.num_cut_off} never end"] if replaced.num_cut_off else []
    return f"{replaced.values.mean():.1%}" + (f" ({'; '.join(notes)})" if notes else "")


def _points(difference: np.ndarray) -> str:
    return f"{100 * difference.mean():+.1f}"


def _span(values: np.ndarray, form: str, scale: float = 1) -> str:
    return " to ".join(form.format(scale * end) for end in interval(values))


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), _line(["---", *["---:"] * (len(names) - 1)])]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
