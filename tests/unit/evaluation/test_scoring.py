"""Tasks by name and from a user's file; rows that cannot be scored."""

from pathlib import Path

import pytest
from written_answers import answers

from mirage_ds.data.rows import Sample
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.evaluation.scoring import TASKS, load_task, score_share, scored, unscorable
from mirage_ds.evaluation.tasks.outcome import Outcome

OWN = """
from dataclasses import dataclass

@dataclass
class Words:
    expected: int

def score(row, answer):
    if "words" not in row:
        return None
    return answer == row["text_output"] or abs(Words(row["words"]).expected - len(answer.split())) / 10

def fails(row, answer):
    return 1 / len(answer)

def texts(row, answer):
    return "right"

def endless(row, answer):
    return float("inf")

def unsure(row, answer):
    if answer == "hm" or (row.get("late") and not answer):
        return None
    return answer == "yes"

def changes(row, answer):
    return len(row.pop("words"))

LIMIT = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_task.py"
    path.write_text(OWN)
    return path


def row(number: int, text_output: str = "", **extra: object) -> Row:
    return Row(number, f"rows.jsonl:{number + 1}", Sample(f"{number:09d}", "How?", text_output, extra=extra))


def test_every_task_scores_its_row() -> None:
    rows = {
        "vsp-spatial-planning": (row(0, map_desc=[[1, 2], [0, 0]]), "\\boxed{R}", "Reached goal", "RIGHT", ""),
        "vsp-spatial-reasoning": (row(0, "\\boxed{B}"), "\\boxed{B}", "Right", "B", "B"),
        "choice": (row(0, options=["x", "y"], answer="y"), "B", "Right", "B", "B"),
        "exact": (row(0, answer="1,000"), "1000.0", "Right", "1000", "1000"),
    }
    assert {*rows, "none"} == set(TASKS)
    for name, (asked, answer, status, given, expected) in rows.items():
        task = load_task(name)
        scores = task.score(asked.sample, answer)
        assert tuple(scores) == task.ways
        outcome = scores[task.ways[0]]
        assert outcome == Outcome(1, status, given, expected), name
        invalid = task.score(asked.sample, "")[task.ways[0]]
        assert invalid == Outcome(0, "Invalid", "", expected), name
        assert task.has_invalid
    assert load_task("none").score(row(0).sample, "x") == {}


def test_a_function_of_the_users_own(file: Path) -> None:
    task = load_task(f"{file}:score")
    assert (task.ways, task.has_invalid) == (("score",), False)
    asked = row(0, "three short words", words=5).sample
    right, near = (task.score(asked, answer)["score"] for answer in ("three short words", "Answer: two words"))
    assert (right.success, right.status) == (1, "scored 1")
    assert (near.success, near.given) == (0.2, "two words")
    with pytest.raises(DataError, match="the task's function returned None"):
        task.score(row(1).sample, "x")


@pytest.mark.parametrize("checked", [True, False])
def test_a_function_decides_by_the_row_alone_which_rows_it_scores(file: Path, checked: bool) -> None:
    """So that no answer is left out of the rates, also where another process has checked the rows."""
    task, rows = load_task(f"{file}:unsure"), [row(0), row(1, late=True)]
    if checked:
        assert [asked.number for asked, _ in unscorable(rows, task)] == [1]
    assert task.score(rows[0].sample, "yes")["score"].success == 1
    with pytest.raises(ConfigError, match=r"returned None, but not for an empty answer \(row 000000000, answer 'hm'\)"):
        task.score(rows[0].sample, "hm")
    with pytest.raises(DataError, match="the task's function returned None"):
        task.score(rows[1].sample, "yes")


@pytest.mark.parametrize(("name", "answer"), [("exact", "red cube"), ("choice", "B"), ("choice", "red cube")])
def test_the_slot_of_a_helper_image_is_no_part_of_the_right_answer(name: str, answer: str) -> None:
    """Without a box or "Answer:", the whole text is the answer."""
    task = load_task(name)
    for text in ("<output_image>red cube", "red <output_image>cube", "<output_image> Red cube.<output_image>"):
        asked = row(0, text, options=["blue cube", "red cube"])
        assert unscorable([asked], task) == []
        assert task.score(asked.sample, answer)[name].success == 1, text


def test_home_and_variables_in_the_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(file.parent))
    monkeypatch.setenv("MY_TASKS", str(file.parent))
    assert load_task("~/my_task.py:score").ways == load_task("$MY_TASKS/my_task.py:score").ways == ("score",)


def test_a_function_gets_a_row_of_its_own(file: Path) -> None:
    """What it does to the row changes nothing."""
    task, asked = load_task(f"{file}:changes"), row(0, words="abc").sample
    assert [task.score(asked, "x")["score"].success for _ in range(2)] == [3, 3]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "fails",
            r"function failed: ZeroDivisionError: division by zero, line 14 of my_task.py \(row 000000007, answer ''\)",
        ),
        ("texts", r"function returned 'right' \(row 000000007.*expected a finite number"),
        ("endless", r"function returned inf \(row 000000007"),
    ],
)
def test_a_function_that_fails_is_named_with_line_and_row(
    file: Path, function: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is decoded: all rows are scored with an empty answer. The file may be named as one likes."""
    monkeypatch.chdir(file.parent)
    for name in (file, file.name, f"../{file.parent.name}/{file.name}"):
        with pytest.raises(ConfigError, match=rf"^rows.jsonl:8: the task's {message}"):
            unscorable([row(7, words=1)], load_task(f"{name}:{function}"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vsp", r"unknown task 'vsp' \(--task\); expected one of vsp-spatial-planning, .*or my_file.py:function"),
        (
            "{folder}/my_task.py",
            r"a file without :function \(--task .*my_task.py\); .* Words, score, .*_task.py:func",
        ),
        ("{folder}/my_task.py:", r"a file without :function \(--task .*my_task.py\); .* Words, score, fails, .*"),
        ("none.py", r"no such file \(--task none.py\)"),
        (":score", "unknown task ':score'"),
        ("none.py:score", r"no such file \(--task none.py:score\)"),
        ("{folder}/my_task.py:scores", "has no function 'scores' .* which are dataclass, Words, score, fails"),
        ("{folder}/my_task.py:LIMIT", "something that cannot be called under the name 'LIMIT'"),
        (
            "{folder}/missing.py:score",
            r"cannot be imported: ModuleNotFoundError: No module named 'nowhere', line 2 of missing.py",
        ),
        ("{folder}/broken.py:score", r"cannot be imported: SyntaxError: [^,]*\(broken.py, line 3\) \(--task"),
    ],
)
def test_tasks_that_cannot_be_used(file: Path, name: str, message: str) -> None:
    (file.parent / "missing.py").write_text("\nimport nowhere\n")
    (file.parent / "broken.py").write_text("\n\ndef score(row, answer:\n")
    with pytest.raises(ConfigError, match=message):
        load_task(name.format(folder=file.parent))


def test_rows_of_another_task() -> None:
    """Their own field is named, and that the task may be wrong."""
    with pytest.raises(DataError, match=r"first, rows.jsonl:1: no field map_desc \(.*; add it, or name another task"):
        unscorable([row(0, "\\boxed{B}")], load_task("vsp-spatial-planning"))
    with pytest.raises(DataError, match="map_desc is None"):
        unscorable([row(0, map_desc=None)], load_task("vsp-spatial-planning"))


def test_rows_that_cannot_be_scored_are_found_before_decoding() -> None:
    rows = [row(0, answer=3), row(1), row(2, answer=[3]), row(3, "\\boxed{3}")]
    found = unscorable(rows, load_task("exact"))
    assert [asked.number for asked, _ in found] == [1, 2]
    assert found[0][1].startswith("no field text_output or answer")
    assert unscorable(rows, load_task("none")) == []
    with pytest.raises(DataError, match=r"no row can be scored as choice; the first, rows.jsonl:1: lists of options"):
        unscorable(rows, load_task("choice"))


ASKED = [row(0, words=1), row(1), row(2, words=3), row(3, words=9)]
DECODED = {arm: answers("????", arm=arm, text="a word", unscored="") for arm in ("own", "mean")}


@pytest.mark.parametrize("size", [1, 3, 20])
def test_ranks_share_the_answers(file: Path, size: int) -> None:
    """Each is scored by one of them, and gets its own scores: |expected words - 2| / 10."""
    task, told = load_task(f"{file}:score"), []
    shares = [
        score_share(DECODED, ASKED, task, Ranks(rank, size), lambda done, total: told.append(done))
        for rank in range(size)
    ]
    assert told == [done for share in shares for done in range(1, len(share) + 1)]
    assert len(told) == 8
    for name, arm in scored(DECODED, shares).items():
        assert [(each.arm, each.number) for each in arm] == [(name, number) for number in range(4)]
        assert [each.scores["score"].success for each in arm if each.scores] == [0.1, 0.1, 0.7]
        assert [bool(each.unscored) for each in arm] == [False, True, False, False]


def test_an_answer_on_which_a_function_fails_is_named(file: Path) -> None:
    """On the rank that scores it."""
    task, empty = load_task(f"{file}:fails"), {"own": answers("??", text="", unscored="")}
    with pytest.raises(ConfigError, match=r"rows.jsonl:2: .*ZeroDivisionError"):
        score_share(empty, ASKED, task, Ranks(1, 2))
