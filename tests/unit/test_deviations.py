"""The comparison behind the parity tests: what it refuses, and what its table then shows."""

import deviations
import pytest
from deviations import check, check_equal


@pytest.fixture(autouse=True)
def _own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deviations, "seen", {})


@pytest.mark.parametrize(
    ("actual", "expected", "measure", "deviation"),
    [
        ([1.0, 2.5], [1.0, 2.0], "absolute", 0.5),
        ([1.0, 2.5], [1.0, 2.0], "relative", 0.25),
        ([1.5, 10.0], [1.0, 10.0], "relative", 0.5),
        ([1.5, 10.0], [1.0, 10.0], "relative to the largest", 0.05),
        ([0.0, 1.0], [0.0, 1.0], "relative", 0.0),
    ],
)
def test_measures(actual: list[float], expected: list[float], measure: str, deviation: float) -> None:
    check("x", actual, expected, deviation + 1e-9, measure)
    assert deviations.seen["x"].worst == pytest.approx(deviation)
    if deviation:
        with pytest.raises(AssertionError, match="y "):
            check("y", actual, expected, deviation - 1e-9, measure)


@pytest.mark.parametrize("measure", ["absolute", "relative", "relative to the largest"])
@pytest.mark.parametrize(("actual", "expected"), [(float("nan"), 1.0), (1.0, float("nan")), (1e-30, 0.0), ([1.0], 1.0)])
def test_refused_at_any_tolerance(actual: object, expected: object, measure: str) -> None:
    """Not-a-number, a shape of another kind, and, but for absolute deviations, anything where the reference has 0."""
    if measure == "absolute" and expected == 0.0:
        return
    with pytest.raises(AssertionError):
        check("x", actual, expected, 1e30, measure)


def test_the_table_keeps_the_worst() -> None:
    for value in (1.0, 1.5, 1.25):
        check("x", value, 1.0, 1.0, "absolute")
    with pytest.raises(AssertionError):
        check("x", float("nan"), 1.0, 1.0, "absolute")
    check("x", 1.0, 1.0, 1.0, "absolute")
    check_equal("y", [1, 2], [1, 2])
    with pytest.raises(AssertionError):
        check_equal("z", "a", "b")
    with pytest.raises(AssertionError, match="compared in two ways"):
        check("x", 1.0, 1.0, 2.0, "absolute")
    assert deviations.table()[-3:] == [
        "| x | 5 | absolute | 1e+00 | nan |",
        "| y | 2 | exact | 0 | 0 |",
        "| z | 1 | exact | 0 | DIFFERENT |",
    ]


def test_comparisons_of_several_processes_are_one_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest-xdist's workers send them."""
    sent = []
    for value in (1.25, 1.5, 1.0):
        monkeypatch.setattr(deviations, "seen", {})
        check("x", value, 1.0, 1.0, "absolute")
        check_equal(f"equal to {value}", value, value)
        sent.append(deviations.as_lists())
    monkeypatch.setattr(deviations, "seen", {})
    for compared in sent:
        deviations.merge(compared)
    assert deviations.table()[-4:] == [
        "| x | 3 | absolute | 1e+00 | 5.0e-01 |",
        "| equal to 1.25 | 1 | exact | 0 | 0 |",
        "| equal to 1.5 | 1 | exact | 0 | 0 |",
        "| equal to 1.0 | 1 | exact | 0 | 0 |",
    ]
