"""Wilson's interval against its definition, solved by bisection; rates, groups and differences counted by hand."""

import functools
import math
from itertools import combinations
from math import comb, sqrt

import pytest
from written_answers import answer, answers, several

from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.bootstrap import mean_interval
from mirage_ds.evaluation.groups import check_groups, grouped
from mirage_ds.evaluation.rates import difference, group_rates, success_rates, wilson_interval
from mirage_ds.evaluation.samples import majority, pass_at, sample_rates
from mirage_ds.evaluation.tasks.outcome import Outcome


def solve(rate: float, total: int, inside: float, outside: float) -> float:
    """The p between `inside` and `outside` that lies exactly 1.96 of its own standard errors from the rate."""
    for _ in range(200):
        middle = (inside + outside) / 2
        if abs(rate - middle) <= 1.959963984540054 * sqrt(middle * (1 - middle) / total):
            inside = middle
        else:
            outside = middle
    return inside


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (1, 1), (5, 10), (169, 200), (30, 200), (1, 1000)])
def test_the_ends_are_just_likely_enough(successes: int, total: int) -> None:
    low, high = wilson_interval(successes, total)
    rate = successes / total
    assert 0 <= low < high <= 1
    assert low == pytest.approx(solve(rate, total, rate, 0.0), abs=1e-9)
    assert high == pytest.approx(solve(rate, total, rate, 1.0), abs=1e-9)


def test_a_published_value() -> None:
    """0 of 10: 0 to 0.2775 (Wilson 1927's formula, z^2 / (n + z^2))."""
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)


def test_rates_of_right_and_wrong_answers() -> None:
    rate = success_rates(answers("xx.x."))["exact"]
    assert rate == {"rate": 0.6, "low": wilson_interval(3, 5)[0], "high": wilson_interval(3, 5)[1], "num_rows": 5}


def test_rows_that_cannot_be_scored_are_left_out() -> None:
    rates = success_rates(answers("x?.?x?"))
    assert rates["exact"]["num_rows"] == 3
    assert rates["exact"]["rate"] == pytest.approx(2 / 3)
    assert success_rates(answers("???")) == {}


def test_scores_in_between_have_a_bootstrap_interval() -> None:
    rate = success_rates(answers("xh.hx"))["exact"]
    assert rate["rate"] == 0.6
    assert (rate["low"], rate["high"]) == mean_interval([1, 0.5, 0, 0.5, 1])


def test_a_row_counts_once_however_many_answers_it_has() -> None:
    """The mean of 1/4 and 1; not 5 of 8."""
    rate = success_rates(several("x...", "xxxx"))["exact"]
    assert (rate["rate"], rate["num_rows"]) == (0.625, 2)
    uneven = success_rates(several("x...", "xx"))["exact"]
    assert uneven["rate"] == 0.625


def test_groups_by_level() -> None:
    """The side of the map, or the row's own level; level 10 after 9."""
    rows = [{"level": 10}, {"map_desc": [[0]] * 9}, {"level": "9"}, {}]
    found = grouped([answer(number, "x", row=row) for number, row in enumerate(rows)])
    assert {name: [each.number for each in group] for name, group in found.items()} == {
        "9": [1, 2],
        "10": [0],
        "-": [3],
    }
    assert list(found) == ["9", "10", "-"]


def test_rows_without_a_level_make_no_groups() -> None:
    assert grouped(answers("x.x")) == {}
    assert grouped([answer(number, "x", row={"level": number}) for number in range(51)]) == {}


def test_groups_by_any_field() -> None:
    kinds = ["red", True, 3, None, ["a"], 3]
    found = grouped([answer(number, "x", row={"kind": kind, "level": 3}) for number, kind in enumerate(kinds)], "kind")
    assert {name: len(group) for name, group in found.items()} == {
        "3": 2,
        "-": 1,
        '["a"]': 1,
        "red": 1,
        "true": 1,
    }


def test_rates_of_groups() -> None:
    """A group in which no row is scored has none; one may have any name, "all" too."""
    kinds = ["a", "b", "b", "c", "all"]
    rates = group_rates(
        [answer(number, "x.x?."[number], row={"kind": kind}) for number, kind in enumerate(kinds)], "kind"
    )
    assert {name: rate["exact"]["rate"] for name, rate in rates.items()} == {"a": 1, "all": 0, "b": 0.5}


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("sort", r"no row has the field 'sort' \(--by\); the rows have id, kind; name one"),
        ("id", r"the field 'id' has 60 values \(--by\); at most 50"),
    ],
)
def test_fields_that_make_no_groups(by: str, message: str) -> None:
    rows = [{"id": number, "kind": number % 2} for number in range(60)]
    check_groups(rows, "kind")
    check_groups(rows, None)
    with pytest.raises(ConfigError, match=message):
        check_groups(rows, by)


def test_a_difference_is_that_of_the_first_way_of_scoring() -> None:
    found = difference(answers("xxx.."), answers("x...x"))
    assert found.value == pytest.approx(1 / 5)
    assert (found.num_rows, found.gained, found.lost) == (5, 2, 1)
    assert (found.low, found.high) == mean_interval([0, 1, 1, 0, -1, 1, -1])
    assert str(found).startswith("+20.0 points (95% interval -")


def test_a_difference_is_paired_by_the_number_of_the_row() -> None:
    """In any order of the answers, with other numbers of samples, over the rows that both have scored."""
    found = difference(several("xx..", "?", "x")[::-1], several("x", "x", "x", "x"))
    assert (found.value, found.num_rows, found.gained, found.lost) == (-0.25, 2, 0, 1)


def test_a_difference_over_no_rows_is_not_a_number() -> None:
    found = difference(answers("x?"), answers("?x"))
    assert math.isnan(found.value)
    assert found.num_rows == 0


def test_rows_where_both_agree_make_the_interval_narrow() -> None:
    """Of 100 rows 10 differ, all in one direction: above 0, where the two rates' own intervals overlap."""
    found = difference(answers("x" * 60 + "." * 40), answers("x" * 50 + "." * 50))
    assert 0 < found.low < 0.1 < found.high < 0.2
    assert wilson_interval(60, 100)[0] < wilson_interval(50, 100)[1]


@functools.cache
def interval_of(total: int, gained: int, lost: int) -> tuple[float, float]:
    same = total - gained - lost
    found = difference(answers("x" * gained + "." * (lost + same)), answers("." * gained + "x" * lost + "." * same))
    assert found.low <= found.value <= found.high
    return found.low, found.high


@pytest.mark.parametrize(
    ("total", "gain", "loss"),
    [
        (30, 0.3, 0.3),
        (30, 0.3, 0.1),
        (30, 0.1, 0.05),
        (30, 0.05, 0.05),
        (30, 0.05, 0.02),
        (30, 0.05, 0),
        (30, 0.03, 0),
        (100, 0.1, 0),
        (100, 0.05, 0),
        (100, 0.03, 0),
        (100, 0.02, 0.02),
        (100, 0.02, 0),
    ],
)
def test_the_interval_of_a_difference_covers_the_true_one(total: int, gain: float, loss: float) -> None:
    """The exact probability that the interval contains the true difference, over all outcomes but the rarest."""
    covered = missed = 0.0
    for gained in range(total + 1):
        for lost in range(total + 1 - gained):
            choices = comb(total, gained) * comb(total - gained, lost)
            probability = choices * gain**gained * loss**lost * (1 - gain - loss) ** (total - gained - lost)
            if probability > 1e-6:
                low, high = interval_of(total, gained, lost)
                covered += probability * (low <= gain - loss <= high)
                missed += probability * (not low <= gain - loss <= high)
    assert covered > 0.945
    assert covered + missed > 0.999


@pytest.mark.parametrize("pattern", ["x", "." * 30, "xh" * 10])
def test_the_interval_of_no_difference_is_no_point(pattern: str) -> None:
    found = difference(answers(pattern), answers(pattern))
    assert found.low < found.value == 0 < found.high


def test_the_interval_of_a_difference_of_other_scores() -> None:
    """The rows that are added gain and lose the span of all scores, and at least that from 0 to 1."""
    own = [answer(number, "x", scores={"score": Outcome(score, "")}) for number, score in enumerate([7, 3, 3])]
    other = [answer(number, "x", scores={"score": Outcome(score, "")}) for number, score in enumerate([5, 3, -1])]
    found = difference(own, other)
    assert (found.low, found.high) == mean_interval([2, 0, 4, 8, -8])


@pytest.mark.parametrize("marks", ["x.x..", ".....", "xxxxx", "....x"])
@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_share_of_choices_with_a_right_answer(marks: str, k: int) -> None:
    choices = list(combinations(marks, k))
    outcomes = [each.scores["exact"] for each in several(marks)]
    assert pass_at(k, outcomes) == pytest.approx(sum("x" in choice for choice in choices) / len(choices))


@pytest.mark.parametrize(
    ("votes", "score"),
    [
        ("AAB", 1),
        ("ABB", 0),
        ("BA", 0),  # equally frequent: the first
        ("AB", 1),
        ("  A", 1),  # what says nothing has no vote
        ("   ", 0),
    ],
)
def test_the_majority(votes: str, score: float) -> None:
    outcomes = [Outcome(vote == "A", "", vote.strip()) for vote in votes]
    assert majority(outcomes) == score


def test_several_answers_to_each_row() -> None:
    found = sample_rates({"own": several("xx....", "xxxx..", "......", "?")})["own"]
    assert list(found) == ["pass@1", "pass@2", "pass@4", "pass@6", "majority"]
    assert found["pass@1"]["rate"] == pytest.approx((2 / 6 + 4 / 6) / 3)
    assert found["pass@2"]["rate"] == pytest.approx((1 - 6 / 15 + 1 - 1 / 15) / 3)
    assert found["pass@6"]["rate"] == pytest.approx(2 / 3)
    assert (found["majority"]["rate"], found["majority"]["num_rows"]) == (pytest.approx(1 / 3), 3)
    assert (found["pass@1"]["low"], found["pass@1"]["high"]) == mean_interval([2 / 6, 4 / 6, 0])


def test_one_answer_to_each_row_has_no_such_rates() -> None:
    assert sample_rates({"own": answers("x.x")}) == {"own": {}}


def test_scores_in_between_are_no_passes() -> None:
    """In no arm, if one arm has them."""
    found = sample_rates({"own": several("x.", ".."), "mean": several("xh", "..")})
    assert {name: list(rates) for name, rates in found.items()} == {"own": ["majority"], "mean": ["majority"]}


def test_an_answer_that_is_not_scored() -> None:
    """Its row has no pass@2; the row's other answer still counts."""
    found = sample_rates({"own": several("x.", ".."), "mean": several("x?", "?."), "first": several("??", "??")})
    assert list(found["own"]) == ["pass@1", "pass@2", "majority"]
    assert list(found["mean"]) == ["pass@1", "majority"]
    assert found["mean"]["pass@1"]["rate"] == 0.5
    assert found["first"] == {}
