"""`mirage compare` as typed: what it prints of finished results files, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner
from written_answers import answer, answers, several

from mirage_ds.cli import app
from mirage_ds.errors import ConfigError, DataError, MirageError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.bootstrap import mean_interval
from mirage_ds.evaluation.finished import read_results
from mirage_ds.evaluation.rates import wilson_interval


def write(path: Path, *arms: list[Answer], task: str = "exact", **settings: object) -> Path:
    """A results file and its summary."""
    counts = {arm[0].arm: {"num_answers": len(arm)} for arm in arms}
    summary = {"task": task, "arms": counts, "settings": {"rows": "digest"} | settings}
    Path(f"{path}.summary.json").write_text(json.dumps(summary))
    path.write_text("".join(json.dumps(asdict(each)) + "\n" for arm in arms for each in arm))
    return path


def compare(*arguments: object) -> str:
    """What the command prints; an error is raised as it is."""
    result = CliRunner().invoke(app, ["compare", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def line_of(printed: str, start: str) -> list[str]:
    """The cells of the first line whose first cell begins so."""
    cells = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in printed.splitlines()]
    return next(line for line in cells if line and line[0].startswith(start))


@pytest.fixture(autouse=True)
def in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_differences_to_the_first_file() -> None:
    write(Path("a.jsonl"), answers("xxxx......"), answers("x" * 10, arm="mean"))
    write(Path("b.jsonl"), answers("xxx.xxx..."), answers("." * 10, arm="mean"))
    write(Path("c.jsonl"), answers(".........."))
    printed = compare("a.jsonl", "b.jsonl", "c.jsonl")
    assert "in brackets: 95% intervals" in printed
    low, high = (100 * end for end in wilson_interval(4, 10))
    assert line_of(printed, "a.jsonl") == ["a.jsonl", f"40.0% [{low:.1f}, {high:.1f}]", "", "", "", "", "0"]
    low, high = (100 * end for end in mean_interval([0, 0, 0, -1, 1, 1, 1, 0, 0, 0, 1, -1]))
    b = line_of(printed, "b.jsonl")
    assert b[2:] == [f"+20.0 [{low:+.1f}, {high:+.1f}]", "3", "1", "40.0%", "0"]
    assert line_of(printed, "c.jsonl")[2].startswith("-40.0 [")
    assert line_of(printed, "c.jsonl")[3:5] == ["0", "4"]
    assert line_of(compare("a.jsonl", "b.jsonl", "--arm", "mean"), "b.jsonl")[2].startswith("-100.0 [-100.0, -")


def test_other_numbers_of_answers_and_another_order() -> None:
    """A row's score is the mean of its answers."""
    write(Path("a.jsonl"), several("x.", "xx", ".."))
    write(Path("b.jsonl"), answers("xx.")[::-1])
    b = line_of(compare("a.jsonl", "b.jsonl"), "b.jsonl")
    assert b[2].startswith("+16.7 [")
    assert b[3:5] == ["1", "0"]


def test_files_without_scores() -> None:
    """By the texts alone, of the samples that both files have; the task `none` gives no success."""
    texts = {"a.jsonl": ["one", "two", "three"], "b.jsonl": ["one", "deux", "trois"], "c.jsonl": ["one", "two", "tres"]}
    for name, words in texts.items():
        made = [answer(number, "?", text=text, unscored="") for number, text in enumerate(words)]
        if name == "c.jsonl":
            made += [answer(number, "?", text="more", unscored="", sample=1) for number in range(3)]
        write(Path(name), made, task="none")
    above, _, below = compare(*texts).partition("rows that changed")
    assert [line_of(above, name) for name in texts] == [
        ["a.jsonl", "", "0"],
        ["b.jsonl", "66.7%", "0"],
        ["c.jsonl", "33.3%", "0"],
    ]
    shown = [line.split("\u2502")[1:-1] for line in below.splitlines() if ".jsonl:" in line]
    assert [[cell.strip() for cell in cells] for cells in shown] == [
        ["test.jsonl:2", "b.jsonl", "another text", "two", "deux"],
        ["test.jsonl:3", "b.jsonl", "another text", "three", "trois"],
        ["test.jsonl:3", "c.jsonl", "another text", "three", "tres"],
    ]
    assert "in brackets" not in above
    assert "rows that changed" not in compare("a.jsonl", "a.jsonl")


def test_long_texts_are_shown_from_where_they_differ() -> None:
    same = "the same words " * 10
    for name, word, space in (("a.jsonl", "left", " "), ("b.jsonl", "right", "  ")):
        texts = [f"{same}{word} {same}", f"{same}{word}", f"two{space}words"]
        write(Path(name), [answer(n, "?", text=text, unscored="") for n, text in enumerate(texts)], task="none")
    _, _, below = compare("a.jsonl", "b.jsonl").partition("rows that changed")
    _, _, change, first, second = line_of(below, "test.jsonl:1")
    assert change == "another text"
    assert first.startswith("...left the same words ")
    assert second.startswith("...right the same words ")
    assert line_of(below, "test.jsonl:2")[3:] == ["...left", "...right"]
    assert line_of(below, "test.jsonl:3")[2:] == ["other white space", "two words", "two words"]


def test_groups() -> None:
    for name, pattern in (("a.jsonl", "xx.."), ("b.jsonl", "xxxx")):
        rows = [answer(number, mark, row={"kind": "ab"[number // 2]}) for number, mark in enumerate(pattern)]
        write(Path(name), rows)
    below = compare("a.jsonl", "b.jsonl", "--by", "kind").partition("kind b: 2")[2]
    assert line_of(below, "a.jsonl")[1].startswith("0.0%")
    assert line_of(below, "b.jsonl")[2].startswith("+100.0")


def test_rows_that_changed() -> None:
    long = "first words " * 10 + "so \\boxed{x}"
    write(Path("a.jsonl"), [answer(0, "."), answer(1, "x", text=long), answer(2, "x")])
    write(Path("b.jsonl"), [answer(0, "x"), answer(1, ".", text="[bold]no\x1b[2J"), answer(2, "x")])
    _, _, below = compare("a.jsonl", "b.jsonl").partition("rows that changed")
    assert line_of(below, "test.jsonl:1")[1:] == ["b.jsonl", "gained, 0 to 1", "so \\boxed{.}", "so \\boxed{x}"]
    lost = line_of(below, "test.jsonl:2")
    assert lost[2] == "lost, 1 to 0"
    assert lost[3] == f"...{long[-57:]}"
    assert lost[4] == "[bold]no [2J"
    assert "test.jsonl:3" not in below
    assert "test.jsonl:2" not in compare("a.jsonl", "b.jsonl", "--changed", 1)
    assert "rows that changed" not in compare("a.jsonl", "b.jsonl", "--changed", 0)
    assert "rows that changed" not in compare("a.jsonl", "a.jsonl")


def test_changed_rows_show_the_answers_that_differ() -> None:
    """Not the first ones, which are the same; of one sample if there is such a pair."""
    text = {"text": "the same"}
    write(Path("a.jsonl"), [*several("....", "x"), answer(2, "x", sample=1), answer(2, ".", **text)])
    write(Path("b.jsonl"), [*several("..x.", "xx."), answer(2, ".", sample=1, text="other"), answer(2, ".", **text)])
    _, _, below = compare("a.jsonl", "b.jsonl").partition("rows that changed")
    assert line_of(below, "test.jsonl:1")[2:] == ["gained, 0 to 0.25", "so \\boxed{.}", "so \\boxed{x}"]
    assert line_of(below, "test.jsonl:2")[2:] == ["lost, 1 to 0.667", "so \\boxed{x}", "so \\boxed{.}"]
    assert line_of(below, "test.jsonl:3")[2:] == ["lost, 0.5 to 0", "so \\boxed{x}", "other"]


def test_answers_that_were_decoded_otherwise() -> None:
    """They are compared, and a line says so; the model may differ, as comparing models is what the command is for."""
    how = {"samples": 1, "temperature": 0.0, "computed": "float32 on cpu", "latent_size": 4}
    write(Path("a.jsonl"), answers("xx."), model="one", **how)
    write(Path("b.jsonl"), answers("x.."), model="two", **how | {"temperature": 0.7, "latent_size": 8})
    printed = compare("a.jsonl", "b.jsonl")
    line = "b.jsonl was decoded otherwise than a.jsonl: latent_size 8, not 4; temperature 0.7, not 0.0\n"
    assert printed.startswith(line)
    assert line_of(printed, "b.jsonl")[4] == "1"
    write(Path("b.jsonl"), answers("x.."), model="two", **how)
    assert "otherwise" not in compare("a.jsonl", "b.jsonl")


def test_settings_that_greedy_decoding_does_not_use() -> None:
    """The seed decides what another arm feeds, and with a temperature both decide the draws."""
    arms = answers("xx."), answers("x..", arm="noise:1.0")
    write(Path("a.jsonl"), *arms, temperature=0.0, top_p=1.0, seed=0)
    write(Path("b.jsonl"), *arms, temperature=0.0, top_p=0.9, seed=42)
    assert "otherwise" not in compare("a.jsonl", "b.jsonl")
    assert "than a.jsonl: seed 42, not 0\n" in compare("a.jsonl", "b.jsonl", "--arm", "noise:1.0")
    write(Path("b.jsonl"), *arms, temperature=0.7, top_p=0.9, seed=42)
    assert "temperature 0.7, not 0.0; top_p 0.9, not 1.0; seed 42, not 0\n" in compare("a.jsonl", "b.jsonl")


def test_a_copy_of_the_data_is_the_same() -> None:
    write(Path("a.jsonl"), answers("x."))
    write(Path("b.jsonl"), [answer(number, "x", where=f"/copy/of.jsonl:{number + 1}") for number in range(2)])
    assert line_of(compare("a.jsonl", "b.jsonl"), "b.jsonl")[2].startswith("+50.0")


@pytest.mark.parametrize(
    ("other", "options", "error", "message"),
    [
        (answers("x."), (), DataError, r"the rows differ: 2 rows, and 3 in a.jsonl \(b.jsonl\)"),
        (answers("xxx", row={"id": 0}), (), DataError, "the field 'id' of row 1 is not the same as in a.jsonl"),
        (answers("???"), (), DataError, r"no answer is scored \(b.jsonl, task exact\)"),
        (answers("xxx"), ("--arm", "mean"), DataError, r"no arm 'mean' \(a.jsonl, --arm\); it has own"),
        (answers("xxx"), ("--by", "kind"), ConfigError, r"no row has the field 'kind' \(--by\)"),
    ],
)
def test_files_that_cannot_be_compared(
    other: list[Answer], options: tuple, error: type[MirageError], message: str
) -> None:
    write(Path("a.jsonl"), answers("xx."))
    write(Path("b.jsonl"), other)
    with pytest.raises(error, match=message):
        compare("a.jsonl", "b.jsonl", *options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rows": "other"},
            r"the rows differ: a question, an image or a right answer is not that of a.jsonl \(b.jsonl\)",
        ),
        ({"task": "choice"}, r"the tasks differ: choice \(b.jsonl\) and exact \(a.jsonl\)"),
    ],
)
def test_other_questions_or_another_task(changes: dict[str, str], message: str) -> None:
    write(Path("a.jsonl"), answers("xx."))
    write(Path("b.jsonl"), answers("xx."), **changes)
    with pytest.raises(DataError, match=message):
        compare("a.jsonl", "b.jsonl")


def test_another_version_of_a_task_file() -> None:
    for name, digest in (("a.jsonl", "1"), ("b.jsonl", "2")):
        write(Path(name), answers("xx."), task="my_file.py:score", task_file=digest)
    with pytest.raises(DataError, match=r"another version of my_file.py scored b.jsonl than a.jsonl .*evaluate again"):
        compare("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (lambda text: "".join(text.splitlines(True)[:2]), "incomplete: its summary counts 3 answers, the file has 2"),
        (lambda text: text[:-20], r"the results file is incomplete or damaged: .* \(b.jsonl:3\); .*copy it again"),
        (lambda _: "", r"the results file is incomplete or damaged: .* \(b.jsonl:1\)"),
    ],
)
def test_a_file_that_was_cut(cut: Callable[[str], str], message: str) -> None:
    write(Path("a.jsonl"), answers("xx."))
    path = write(Path("b.jsonl"), answers("xx."))
    path.write_text(cut(path.read_text()))
    with pytest.raises(DataError, match=message):
        compare("a.jsonl", "b.jsonl")


def test_the_file_of_a_task_may_have_moved() -> None:
    write(Path("a.jsonl"), answers("xx."), task="tasks/my_file.py:score")
    write(Path("b.jsonl"), answers("x.."), task="my_file.py:score")
    assert line_of(compare("a.jsonl", "b.jsonl"), "b.jsonl")[4] == "1"


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[1]",
        "{}",
        '{"task": "exact", "settings": {}}',
        '{"task": 1}',
        '{"task": "exact", "settings": {"rows": ""}}',
    ],
)
def test_a_summary_that_is_none(text: str | None) -> None:
    write(Path("a.jsonl"), answers("xx."))
    Path("a.jsonl.summary.json").unlink() if text is None else Path("a.jsonl.summary.json").write_text(text)
    with pytest.raises(DataError, match=r"the summary cannot be used: .* \(a.jsonl.summary.json\); expected the file"):
        compare("a.jsonl", "a.jsonl")


def test_a_results_file_that_is_none() -> None:
    """It is named, not its summary, which is not there either."""
    write(Path("a.jsonl"), answers("xx."))
    Path("folder").mkdir()
    for name, reason in (("none.jsonl", "No such file or directory"), ("folder", "Is a directory")):
        with pytest.raises(DataError, match=rf"the results file cannot be read: {reason} \({name}\)"):
            compare(name, "a.jsonl")


def test_one_file_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"results files on the command line: 1; expected two or more"):
        compare(write(Path("a.jsonl"), answers("x")))


@pytest.mark.parametrize(
    "change",
    [
        {"number": "0"},
        {"scores": {"exact": {"success": "x", "status": ""}}},
        {"scores": {"exact": {"success": None, "status": ""}}},
        {"scores": {"exact": {"right": 1}}},
        {"scores": {"exact": 1}},
        {"scores": [1]},
        {"row": None},
        {"complete": 1},
        {"later": 1},
    ],
)
def test_a_line_that_is_no_answer(tmp_path: Path, change: dict) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps(asdict(answer(0, "x")) | change) + "\n")
    with pytest.raises(DataError, match=r"the line is no answer: .* \(b.jsonl:1\); expected a line of a results file"):
        read_results(Path("b.jsonl"))


@pytest.mark.parametrize("text", ['{"text_input": "?"}', "{", "[1]", ""])
def test_files_that_are_no_results(text: str) -> None:
    Path("b.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"b\.jsonl"):
        read_results(Path("b.jsonl"))
    with pytest.raises(DataError, match=r"No such file or directory \(c.jsonl\)"):
        read_results(Path("c.jsonl"))


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """So that it answers at once."""
    write(Path("a.jsonl"), answers("x."))
    program = "import sys\nfrom mirage_ds.cli import app\nsys.argv = ['mirage', 'compare', 'a.jsonl', 'a.jsonl']\n"
    program += "try: app()\nexcept SystemExit: print('torch' in sys.modules)\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert result.stdout.strip().endswith("False"), result.stderr
