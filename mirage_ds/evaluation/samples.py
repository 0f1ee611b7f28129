"""What several answers to each row are worth together: pass@k, and the vote of the majority."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import comb

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.rates import Rate, rate_of, ways_of
from mirage_ds.evaluation.tasks.outcome import Outcome


def sample_rates(answers: Iterable[Answer]) -> dict[str, Rate]:
    """`pass@1`, `pass@2`, `pass@4`, ... and `majority` over rows, by the first way of scoring.

    Empty if each row has one answer. Scores other than 0 and 1 are no passes: for them only `majority`.
    """
    answers = list(answers)
    rows: dict[int, list[Outcome]] = {}
    for way in ways_of(answers)[:1]:
        for answer in answers:
            if answer.scores:
                rows.setdefault(answer.number, []).append(answer.scores[way])
    num_samples = min(map(len, rows.values()), default=0)
    if num_samples < 2:
        return {}
    found = {}
    if {outcome.success for outcomes in rows.values() for outcome in outcomes} <= {0, 1}:
        for k in _counts(num_samples):
            found[f"pass@{k}"] = rate_of([pass_at(k, outcomes) for outcomes in rows.values()])
    return found | {"majority": rate_of([majority(outcomes) for outcomes in rows.values()])}


def pass_at(k: int, outcomes: Sequence[Outcome]) -> float:
    """The share of all choices of k of a row's answers that have a right one: 1 - C(wrong, k) / C(all, k)."""
    wrong = sum(outcome.success == 0 for outcome in outcomes)
    return 1 - comb(wrong, k) / comb(len(outcomes), k)


def majority(outcomes: Sequence[Outcome]) -> float:
    """The score of what most of a row's answers give, the first of equally frequent ones.

    Answers that say nothing have no vote; if none says anything, it is the first one's score.
    """
    votes = Counter(outcome.given for outcome in outcomes if outcome.given)
    winner = votes.most_common(1)[0][0] if votes else outcomes[0].given
    return float(next(outcome.success for outcome in outcomes if outcome.given == winner))


def _counts(num_samples: int) -> list[int]:
    """1, 2, 4, ... and the number of answers itself."""
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    return [*powers, num_samples]
