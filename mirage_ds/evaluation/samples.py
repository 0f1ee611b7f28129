"""What several answers to each row are worth together: pass@k, and the vote of the majority."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from math import comb

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.rates import Rate, first_of, rate_of
from mirage_ds.evaluation.tasks.outcome import Outcome


def sample_rates(arms: Mapping[str, Iterable[Answer]]) -> dict[str, dict[str, Rate]]:
    """`pass@1`, `pass@2`, `pass@4`, ... and `majority` of each arm over rows, by the first way of scoring.

    All arms have the same columns, but for one in which no row has k scored answers: it lacks pass@k. Empty if each row
    has one answer. If any arm has scores other than 0 and 1, which are no passes, there is `majority` only.
    """
    rows = {name: _outcomes(answers) for name, answers in arms.items()}
    every = [outcomes for arm in rows.values() for outcomes in arm]
    num_samples = max(map(len, every), default=0)
    if num_samples < 2:
        return {name: {} for name in arms}
    passes = {outcome.success for outcomes in every for outcome in outcomes} <= {0, 1}
    return {name: _arm_rates(arm, _counts(num_samples) if passes else []) for name, arm in rows.items()}


def _outcomes(answers: Iterable[Answer]) -> list[list[Outcome]]:
    """Those of each row that has scored answers."""
    rows: dict[int, list[Outcome]] = {}
    for answer in answers:
        if answer.scores:
            rows.setdefault(answer.number, []).append(first_of(answer))
    return list(rows.values())


def _arm_rates(rows: list[list[Outcome]], counts: Iterable[int]) -> dict[str, Rate]:
    scores = {f"pass@{k}": [pass_at(k, outcomes) for outcomes in rows if len(outcomes) >= k] for k in counts}
    scores["majority"] = [majority(outcomes) for outcomes in rows]
    return {column: rate_of(part) for column, part in scores.items() if part}


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
