"""The table of the arms and the summary, counted by hand."""

import pytest
from rich.console import Console
from rich.table import Table
from written_answers import answer, answers, several

from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.rates import differ, paired, wilson_interval
from mirage_ds.evaluation.report.view import arm_results
from mirage_ds.evaluation.scoring import load_task
from mirage_ds.evaluation.tables import arms_table, samples_table, summary_of, tables_of, warnings_of
from mirage_ds.evaluation.tasks.outcome import Outcome

EXACT, CHOICE = load_task("exact"), load_task("choice")


def lines(table: Table | None) -> list[list[str]]:
    """The cells of a table, by row; where one has several lines, the first row has its first line."""
    assert table is not None
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    rows = [line.strip("\u2502\u2503") for line in capture.get().splitlines() if line[:1] in "\u2502\u2503"]
    return [[cell.strip() for cell in line.replace("\u2503", "\u2502").split("\u2502")] for line in rows]


def columns(table: Table) -> list[str]:
    """The headings in one line each."""
    return [str(column.header).replace("\n", " ") for column in table.columns]


def by_arm(table: Table) -> list[list[str]]:
    """The lines that begin with an arm or a group."""
    return [line for line in lines(table) if line[0]]


def arms() -> dict[str, list[Answer]]:
    own = answers("xxx..?", num_latents=4)
    mean = answers("x....?", arm="mean", num_latents=4, num_replaced=4)
    mean[1].complete, mean[2].num_blocks, mean[2].num_latents, mean[2].num_replaced = False, 0, 0, 0
    return {"own": own, "mean": mean}


def test_the_table_of_the_arms() -> None:
    table = arms_table(arms(), EXACT)
    assert table.caption == "in brackets: 95% intervals; +3 -1: rows gained and lost"
    assert columns(table) == [
        *("arm", "exact other", "minus own", "differ", "invalid", "never ended", "with a block", "replaced")
    ]
    title, unscored, own, own_other, mean, mean_other = lines(table)[2:]
    assert (title[0], unscored[0]) == ("all rows: 6", "1 not scored")
    low, high = wilson_interval(3, 5)
    assert own[:2] == ["own", f"60.0% [{100 * low:.1f}, {100 * high:.1f}]"]
    assert own[2:] == ["", "", "0.0%", "0.0%", "100.0%", "0.0%"]
    assert own_other[1] == mean_other[1] == "100.0% [56.6, 100.0]"
    assert mean[0] == "mean"
    assert mean[1].startswith("20.0% [")
    assert mean[2].startswith("-40.0 [-71.4, ")
    assert mean[2].endswith("], +0 -2")
    assert mean[3:] == ["33.3%", "0.0%", "16.7%", "83.3%", "100.0%"]


def lettered(given: str, expected: str, arm: str = "own", text: str = "") -> list[Answer]:
    """An answer to each row: the letters given, - for an invalid one, and the right letters."""
    found = []
    for number, (letter, right) in enumerate(zip(given, expected, strict=True)):
        status = "Invalid" if letter == "-" else "Right" if letter == right else "Wrong"
        outcome = Outcome(letter == right, status, letter.strip("-"), right)
        found.append(answer(number, "x", arm=arm, text=text or f"so {letter}", scores={"choice": outcome}))
    return found


def test_a_score_that_hides_what_changed() -> None:
    """Answers that change from wrong to wrong, or between right and wrong."""
    found = {"own": lettered("AAB-", "ABCA"), "none": lettered("-BC-", "ABCA", "none")}
    *_, own, none = lines(arms_table(found, CHOICE))
    assert own[2:5] == ["", "", "25.0%"]
    assert none[2:5] == [*none[2:3], "75.0%", "50.0%"]
    summary = summary_of(found, CHOICE)["arms"]
    assert [(summary[arm]["num_differing"], summary[arm]["num_invalid"]) for arm in found] == [(0, 1), (3, 2)]


def test_answers_are_the_same_by_what_they_give_else_by_their_texts() -> None:
    """Of two that give nothing, or of which one does, the texts count; the report has the same numbers."""
    own = lettered("AA---", "AAAAA")
    other = [*lettered("AB-", "AAA", "none", "other words"), *lettered("--A", "AAA", "none")[1:]]
    other[3].number, other[4].number = 3, 4
    found = {"own": own, "none": other}
    assert [differ(*pair) for pair in paired(other, own)] == [False, True, True, False, True]
    assert summary_of(found, CHOICE)["arms"]["none"]["num_differing"] == 3
    _, reported = arm_results(found, CHOICE)
    assert reported.changed is not None
    assert reported.changed.value == 0.6


def test_texts_are_compared_where_nothing_is_scored() -> None:
    found = {"own": answers("???", unscored=""), "mean": answers("???", unscored="", arm="mean")}
    found["mean"][2].text = "another"
    table = arms_table(found, load_task("none"))
    *_, mean = lines(table)
    assert columns(table) == ["arm", "differ", "never ended", "with a block", "replaced"]
    assert mean[1] == "33.3%"
    assert table.caption is None  # it has no brackets


def test_shares_of_several_answers_to_a_row() -> None:
    found = {"own": several("x.", ".x"), "mean": several("x.", ".x", arm="mean")}
    found["mean"][1].scores["exact"], found["mean"][1].text = Outcome(0, "Invalid"), "no box"
    *_, title, _, _, mean, _ = lines(arms_table(found, EXACT))
    assert title[0] == "all rows: 2"
    assert mean[3:7] == ["25.0%", "25.0%", "0.0%", "100.0%"]


def test_the_table_fits_into_120_columns() -> None:
    own = answers("x" * 300 + "." * 100)
    other = answers("." * 150 + "x" * 250, arm="image:other", num_replaced=4)
    table = arms_table({"own": own, "image:other": other}, EXACT)
    assert len(table.columns) == 8
    console = Console(width=120)
    with console.capture() as capture:
        console.print(table)
    (line,) = (line for line in capture.get().splitlines() if "image:other" in line)
    assert "], +100 -150 " in line
    assert " 62.5% [57.7, 67.1] " in line


def test_the_chance_level() -> None:
    """Over rows, however many answers they have; none if a row may have several right answers."""
    found = {"own": lettered("AAAAA", "ABBCB")}
    assert "always the most frequent answer: 60.0%" in str(arms_table(found, CHOICE).caption)
    assert summary_of(found, CHOICE)["always_the_most_frequent"] == {"answer": "B", "rate": 0.6}
    found = {"own": [*lettered("A", "A"), *lettered("AAA", "ABB")]}
    assert summary_of(found, CHOICE)["always_the_most_frequent"]["rate"] == pytest.approx(2 / 3)
    for none in (answers("x."), answers("??")):
        assert "always_the_most_frequent" not in summary_of({"own": none}, EXACT)


@pytest.mark.parametrize(
    ("given", "expected", "warned"),
    [
        ("AAAA", "ABCA", True),
        ("A-A-", "AABA", True),
        ("AAAA", "BCBC", True),  # all wrong
        ("AAAA", "AAAA", False),
        ("A-A-", "ABAC", False),  # only the invalid ones' rows differ
        ("AAAB", "ABCA", False),
    ],
)
def test_a_constant_answer_is_warned_of(given: str, expected: str, *, warned: bool) -> None:
    warnings = warnings_of({"own": lettered(given, expected)})
    assert [warning.partition(", but")[0] for warning in warnings] == (
        [f"all {given.count('A')} valid answers in the arm own are 'A'"] if warned else []
    )


def test_no_valid_answer_is_warned_of() -> None:
    """Of rows that are scored; a task of one's own has no invalid answers."""
    found = {"own": [*lettered("---", "ABC"), answer(3, "?")]}
    (warning,) = warnings_of(found)
    assert warning.startswith("all 3 scored answers in the arm own are invalid: ")
    found["own"] += lettered("B", "C")
    assert warnings_of(found) == []
    assert warnings_of({"own": answers("...?")[3:]}) == []


def test_a_constant_answer_of_rows_with_several_right_ones() -> None:
    """Such as the same moves on all maps: it is right in some rows."""
    moves = [answer(row, "x", scores={"strict": Outcome(row % 2, "", "RIGHT")}) for row in range(4)]
    assert len(warnings_of({"own": moves})) == 1
    assert warnings_of({"own": moves[1:2]}) == warnings_of({"own": answers("??")}) == []


def test_groups_stand_below() -> None:
    own = [answer(number, "x.."[number % 3], row={"level": 3 + number % 2}) for number in range(6)]
    table = by_arm(arms_table({"own": own}, EXACT))
    assert [line[0] for line in table] == ["arm", "all rows: 6", "own", "level 3: 3", "own", "level 4: 3", "own"]
    assert [line[1][:5] for line in table if line[0] == "own"] == ["33.3%"] * 3
    named = [answer(number, "x", row={"kind": kind}) for number, kind in enumerate(["all", "-", "all"])]
    table = by_arm(arms_table({"own": named}, EXACT, by="kind"))
    assert [line[0] for line in table if line[0] != "own"] == ["arm", "all rows: 3", "kind -: 1", "kind all: 2"]
    by = by_arm(arms_table({"own": answers("x.")}, EXACT, by="id"))
    assert [line[0] for line in by if line[0] != "own"] == ["arm", "all rows: 2", "id 0: 1", "id 1: 1"]


def test_answers_that_are_not_scored() -> None:
    """`none` counts only; a group without scores has none."""
    found = [answer(number, "?", unscored="") for number in range(3)]
    table = arms_table({"own": found}, load_task("none"))
    *_, own = lines(table)
    assert columns(table) == ["arm", "never ended", "with a block", "replaced"]
    assert own == ["own", "0.0%", "100.0%", "0.0%"]
    assert "rates" not in summary_of({"own": found}, load_task("none"))["arms"]["own"]
    table = lines(arms_table({"own": answers("x?")}, EXACT, by="id"))
    assert table[-3:] == [
        ["id 1: 1", *[""] * 5],
        ["1 not scored", *[""] * 5],
        ["own", "-", "-", "0.0%", "100.0%", "0.0%"],
    ]


def test_scores_of_another_range_are_no_percentages() -> None:
    own = [answer(number, "x", scores={"score": Outcome(number * 1.5, "")}) for number in range(3)]
    table = lines(arms_table({"own": own}, EXACT))
    assert table[-1][1].startswith("1.5 [")


def test_a_title_is_no_markup() -> None:
    own = [answer(number, "x", row={"kind": f"[red]{number}"}) for number in range(2)]
    assert by_arm(arms_table({"own": own}, EXACT, by="kind"))[3][0] == "kind [red]0: 1"


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
        "num_differing": 2,
        "num_invalid": 0,
    }
    assert mean["rates"]["exact"]["rate"] == 0.2
    assert mean["groups"] == {}
    assert mean["minus_own"]["value"] == pytest.approx(-0.4)
    assert (mean["minus_own"]["gained"], mean["minus_own"]["lost"], mean["minus_own"]["num_rows"]) == (0, 2, 5)
    assert mean["groups_minus_own"] == {}
    assert found["arms"]["own"]["minus_own"]["value"] == 0


def test_the_summary_has_the_differences_of_groups() -> None:
    """But for a group of which no row is scored."""
    rows = [{"kind": kind} for kind in "aabbc"]
    own, mean = (
        [answer(number, mark, row=row) for number, (mark, row) in enumerate(zip(marks, rows, strict=True))]
        for marks in ("xxx.?", "x..x?")
    )
    found = summary_of({"own": own, "mean": mean}, EXACT, by="kind")["arms"]["mean"]["groups_minus_own"]
    assert {name: (part["value"], part["gained"], part["lost"], part["num_rows"]) for name, part in found.items()} == {
        "a": (-0.5, 0, 1, 2),
        "b": (0, 1, 1, 2),
    }
