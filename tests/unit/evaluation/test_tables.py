"""The table of the arms and the summary, counted by hand."""

import pytest
from rich.console import Console
from rich.table import Table
from written_answers import answer, answers, several

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.rates import wilson_interval
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.evaluation.tables import arms_table, samples_table, summary_of, tables_of
from mirage_ds.evaluation.tasks.outcome import Outcome

EXACT = load_task("exact")


def lines(table: Table | None) -> list[list[str]]:
    """The cells of a table, by row."""
    assert table is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    rows = [line.strip("\u2502\u2503") for line in capture.get().splitlines() if line[:1] in "\u2502\u2503"]
    return [[cell.strip() for cell in line.replace("\u2503", "\u2502").split("\u2502")] for line in rows]


def arms() -> dict[str, list[Answer]]:
    own = answers("xxx..?", num_latents=4)
    mean = answers("x....?", arm="mean", num_latents=4, num_replaced=4)
    mean[1].complete, mean[2].num_blocks, mean[2].num_latents, mean[2].num_replaced = False, 0, 0, 0
    return {"own": own, "mean": mean}


def test_the_table_of_the_arms() -> None:
    heading, title, own, mean = lines(arms_table(arms(), EXACT))
    assert heading == ["arm", "exact", "other", "minus own", "never ended", "with a block", "replaced"]
    assert title[0] == "all rows: 6, 1 not scored"
    low, high = wilson_interval(3, 5)
    assert own[:2] == ["own", f"60.0% [{100 * low:.1f}, {100 * high:.1f}]"]
    assert own[3:] == ["", "0", "6", "0 of 24"]
    assert mean[0] == "mean"
    assert mean[1].startswith("20.0% [")
    assert mean[3].startswith("-40.0 [-71.4, ")
    assert mean[3].endswith("], +0 -2 rows")
    assert mean[4:] == ["1", "5", "20 of 20"]


def test_groups_stand_below() -> None:
    own = [answer(number, "x.."[number % 3], row={"level": 3 + number % 2}) for number in range(6)]
    table = lines(arms_table({"own": own}, EXACT))
    assert [line[0] for line in table] == ["arm", "all rows: 6", "own", "level 3: 3", "own", "level 4: 3", "own"]
    assert [line[1][:5] for line in table if line[0] == "own"] == ["33.3%"] * 3
    named = [answer(number, "x", row={"kind": kind}) for number, kind in enumerate(["all", "-", "all"])]
    table = lines(arms_table({"own": named}, EXACT, by="kind"))
    assert [line[0] for line in table if line[0] != "own"] == ["arm", "all rows: 3", "kind -: 1", "kind all: 2"]
    by = lines(arms_table({"own": answers("x.")}, EXACT, by="id"))
    assert [line[0] for line in by if line[0] != "own"] == ["arm", "all rows: 2", "id 0: 1", "id 1: 1"]


def test_answers_that_are_not_scored() -> None:
    """`none` counts only; a group without scores has none."""
    found = [answer(number, "?", unscored="") for number in range(3)]
    heading, _, own = lines(arms_table({"own": found}, load_task("none")))
    assert heading == ["arm", "never ended", "with a block", "replaced"]
    assert own == ["own", "0", "3", "0 of 12"]
    assert "rates" not in summary_of({"own": found}, load_task("none"))["arms"]["own"]
    table = lines(arms_table({"own": answers("x?")}, EXACT, by="id"))
    assert table[-2:] == [["id 1: 1, 1 not scored", *[""] * 5], ["own", "-", "-", "0", "1", "0 of 4"]]


def test_scores_of_another_range_are_no_percentages() -> None:
    own = [answer(number, "x", scores={"score": Outcome(number * 1.5, "")}) for number in range(3)]
    table = lines(arms_table({"own": own}, EXACT))
    assert table[-1][1].startswith("1.5 [")


def test_a_title_is_no_markup() -> None:
    own = [answer(number, "x", row={"kind": f"[red]{number}"}) for number in range(2)]
    assert lines(arms_table({"own": own}, EXACT, by="kind"))[3][0] == "kind [red]0: 1"


def test_several_answers_have_a_table_of_their_own() -> None:
    assert samples_table({"own": answers("x.")}) is None
    heading, own = lines(samples_table({"own": several("x.", "..")}))
    assert heading == ["arm", "pass@1", "pass@2", "majority"]
    assert [cell.split(" ")[0] for cell in own] == ["own", "25.0%", "50.0%", "50.0%"]
    assert len(tables_of({"own": several("x.", "..")}, EXACT)) == 2


def test_arms_of_which_one_lacks_a_column() -> None:
    """Scores in between are no passes, in whatever arm; an answer that is not scored leaves its row without pass@2."""
    heading, own, mean = lines(samples_table({"own": several("x.", ".."), "mean": several("xh", "..")}))
    assert (heading, len(own), len(mean)) == (["arm", "majority"], 2, 2)
    heading, mean, own = lines(samples_table({"mean": several("x?", "?."), "own": several("x.", "..")}))
    assert heading == ["arm", "pass@1", "pass@2", "majority"]
    assert [cell.split(" ")[0] for cell in mean] == ["mean", "50.0%", "-", "50.0%"]
    assert [cell.split(" ")[0] for cell in own] == ["own", "25.0%", "50.0%", "50.0%"]


def test_the_summary() -> None:
    found = summary_of(arms(), EXACT)
    assert (found["task"], found["by"]) == ("exact", None)
    mean = found["arms"]["mean"]
    assert {name: mean[name] for name in mean if name.startswith("num_")} == {
        "num_answers": 6,
        "num_unscored": 1,
        "num_cut_off": 1,
        "num_with_block": 5,
        "num_latents": 20,
        "num_replaced": 20,
    }
    assert mean["rates"]["exact"]["rate"] == 0.2
    assert mean["groups"] == {}
    assert mean["minus_own"]["value"] == pytest.approx(-0.4)
    assert (mean["minus_own"]["gained"], mean["minus_own"]["lost"], mean["minus_own"]["num_rows"]) == (0, 2, 5)
    assert found["arms"]["own"]["minus_own"]["value"] == 0
