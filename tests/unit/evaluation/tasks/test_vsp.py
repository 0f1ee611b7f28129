"""Scoring: the reference's own cases, and the strict rule that differs from it."""

from typing import Any

import golden_set
import pytest

from mirage_ds.errors import DataError
from mirage_ds.evaluation.tasks.given import extract_boxed
from mirage_ds.evaluation.tasks.vsp import MOVES, Mode, parse_moves, score, simulate

CASES: list[dict[str, Any]] = golden_set.numbers("text")["scoring"]
MAP = [[1, 0, 0], [0, -1, 0], [0, 0, 2]]


@pytest.mark.parametrize("case", CASES, ids=[f"{place}" for place in range(len(CASES))])
def test_as_the_reference_scores(case: dict[str, Any]) -> None:
    boxed = extract_boxed(case["answer"])
    assert ("None" if boxed is None else boxed) == case["boxed"]
    outcome = score(case["map_desc"], case["answer"], "reference")
    assert (outcome.success, outcome.status) == (case["success"], case["status"])


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{a{b}{c{d}}} e}", "a{b}{c{d}}"),
        ("\\boxed{a} \\boxed{ b }.", "b"),
        ("\\boxed{a} \\boxed{b", None),
        ("\\boxed{\\boxed{a}}", "a"),
        ("\\boxed{}", ""),
        ("boxed{a}", None),
        ("", None),
    ],
)
def test_the_last_box(text: str, boxed: str | None) -> None:
    assert extract_boxed(text) == boxed


@pytest.mark.parametrize(
    ("answer", "strict", "reference"),
    [
        ("RIGHT, DOWN", "RD", "RD"),
        ("R,U", "RU", "RU"),
        ("left up\nD", "LUD", "LUD"),
        (" L , R ", "LR", "LR"),
        ("LR", None, "LR"),
        ("Turn right", None, "URR"),
        ("Answer: L", None, "RL"),
        ("RIGHT,, DOWN", None, "RD"),
        ("RIGHT, DOWN,", None, "RD"),
        ("RIGHTDOWN", None, "RD"),
        ("\\text{UP}", None, "U"),
        ("", None, ""),
        (None, None, ""),
    ],
)
def test_strict_takes_lists_of_moves_alone(answer: str | None, strict: str | None, reference: str) -> None:
    def words(letters: str) -> list[str]:
        return [next(name for name in MOVES if name[0] == letter) for letter in letters]

    assert parse_moves(answer, "reference") == words(reference)
    assert parse_moves(answer, "strict") == (None if strict is None else words(strict))


@pytest.mark.parametrize(
    ("moves", "status"),
    [
        ("RRDD", "Reached goal"),
        ("LURRDD", "Reached goal"),  # off the map: stays
        ("RRDDU", "Did not reach goal"),  # passing over the goal is not enough
        ("RRDDUD", "Reached goal"),
        ("RDRRDD", "Fell in hole"),  # and no way out of it
        ("", "Did not reach goal"),
    ],
)
def test_the_walk(moves: str, status: str) -> None:
    names = {name[0]: name for name in MOVES}
    outcome = simulate(MAP, [names[letter] for letter in moves])
    assert (outcome.status, outcome.success) == (status, status == "Reached goal")


@pytest.mark.parametrize(("mode", "status"), [("strict", "Invalid"), ("reference", "Did not reach goal")])
def test_an_answer_without_a_box(mode: Mode, status: str) -> None:
    outcome = score(MAP, "RIGHT, RIGHT, DOWN, DOWN", mode)
    assert (outcome.status, outcome.success) == (status, False)


@pytest.mark.parametrize(
    "map_desc",
    [None, [], [[1, 2]], [[1, 0], [0, 0]], [[1, 1], [2, 0]], [[1, 2], [0]], [[1, 2], [0, 3]], [["1", 2], [0, 0]], "12"],
)
def test_what_is_no_map_is_refused(map_desc: Any) -> None:
    with pytest.raises(DataError, match=r"map_desc is .* exactly one 1"):
        simulate(map_desc, ["UP"])
