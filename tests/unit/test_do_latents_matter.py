"""The benchmark of latents without its training: its intervals and tables, equal seconds, and what a start repeats."""

import json
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import latents_table
import numpy as np
import pytest
from latents_table import Replaced, arms_table, interval
from latents_table import latents_table as table_of_latents

from benchmarks.do_latents_matter import OVERRIDES, TEXT_ARMS, Benchmark
from benchmarks.parts_once import Parts
from mirage_ds.errors import ConfigError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.tasks.outcome import Outcome, Scores


def drawn(num_seeds: int, num_rows: int, rate: float) -> np.ndarray:
    return (np.random.default_rng(1).random((num_seeds, num_rows)) < rate).astype(float)


def test_an_interval_covers_rows_and_seeds() -> None:
    """Seeds that agree leave the variation of rows, and rows that agree that of seeds, as formulas give them."""
    rows = np.repeat(drawn(1, 400, 0.7), 3, axis=0)
    low, high = interval(rows)
    assert high - low == pytest.approx(2 * 1.96 * rows[0].std() / 20, rel=0.05)
    assert low < rows.mean() < high
    rates = np.linspace(0.4, 0.8, 9)
    low, high = interval(np.repeat(rates[:, None], 400, axis=1))
    assert high - low == pytest.approx(2 * 1.96 * rates.std() / 3, rel=0.05)


def test_an_interval_against_a_plain_bootstrap() -> None:
    """Both at once, against loops that draw answer by answer."""
    values = drawn(3, 40, 0.6)
    values[2] *= drawn(1, 40, 0.5)[0]
    random = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        seeds = [random.integers(3) for _ in range(3)]
        rows = [random.integers(40) for _ in range(40)]
        means.append(np.mean([values[seed, row] for seed in seeds for row in rows]))
    assert interval(values) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.02)


def answers() -> latents_table.Answers:
    """2 seeds x 4 rows; with zeros 3 of the 8 answers never end."""
    right, half, wrong = [True] * 4, [True, True, False, False], [False] * 4
    by_latents = {"own": Replaced([right, right]), "mean": Replaced([half, half]), "zeroed": Replaced([wrong] * 2, 3)}
    return {"text": {"own": Replaced([half, half])}} | dict.fromkeys(OVERRIDES, by_latents)


def test_the_tables_say_what_was_solved() -> None:
    training = {arm: {"samples": 640.0, "minutes": 1.5} for arm in ("text", *OVERRIDES)}
    lines = arms_table(answers(), training)
    assert len(lines) == 2 + 1 + len(OVERRIDES)
    assert lines[2].startswith("| text, same samples | 640 | 1.5 | 50.0% |")
    assert lines[3].startswith("| stage 1 + stage 2 | 640 | 1.5 | 100.0% | 100.0% to 100.0% | 100.0%, 100.0% | +50.0 |")
    stage1 = {arm: {"own": Replaced([[True, False]])} for arm in ("latents", "gray")}
    _, _, own, mean, zeroed, after_stage1 = table_of_latents(answers(), stage1)
    assert after_stage1 == "| own, after stage 1 alone | 50.0% | 50.0% |"
    assert own == "| own | 100.0% | 100.0% |"
    assert zeroed.count("| 0.0% (+100.0: +100.0 to +100.0; 3 never end)") == 2
    low, high = interval(np.array([[0.0, 0.0, 1.0, 1.0]] * 2))
    assert mean.count(f"50.0% (+50.0: {100 * low:+.1f} to {100 * high:+.1f})") == 2


def test_a_note_where_images_stay_visible_without_a_block() -> None:
    own = {"own": Replaced([[True]])}
    assert (
        "hidden with visible images" in table_of_latents(answers(), dict.fromkeys(("latents", "unseen_image"), own))[-1]
    )
    assert "visible" not in " ".join(table_of_latents(answers(), dict.fromkeys(("latents", "gray"), own)))


def test_the_settings_of_an_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(
        Benchmark, "once", lambda _self, _name, _run, command: commands.append(" ".join(map(str, command)))
    )
    benchmark = Benchmark("hidden", tmp_path, short=False, jobs=1)
    for arm in ("gray", "unseen_image", "latents"):
        benchmark.train(0, arm, "stage1", 5)
    settings = ("data.helper=gray", "model.answer_sees_image=false")
    assert [[setting in command for setting in settings] for command in commands] == [[1, 0], [0, 1], [0, 0]]


def test_a_complete_part_is_not_repeated(tmp_path: Path) -> None:
    ran: list[str] = []

    def fail() -> None:
        (tmp_path / "two").mkdir()
        raise SystemExit("interrupted")

    parts = Parts(tmp_path, {"task": "vsp"})
    parts.once("one", [], lambda: ran.append("one"))
    with pytest.raises(SystemExit):
        parts.once("two", [tmp_path / "two"], fail)
    again = Parts(tmp_path, {"task": "vsp"})
    again.once("one", [], lambda: ran.append("one again"))
    again.once("two", [tmp_path / "two"], lambda: (tmp_path / "two").mkdir())  # what was left of it is gone
    assert ran == ["one"]
    lines = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == ["one", "two"]
    assert all(line["commit"] and line["date"] for line in lines)
    with pytest.raises(ConfigError, match="one folder is for one task in one size"):
        Parts(tmp_path, {"task": "hidden"})


def test_after_a_failed_arm_no_other_one_begins(tmp_path: Path) -> None:
    ran: list[int] = []

    def fail() -> None:
        raise SystemExit("exit code 3")

    def take(number: int) -> None:
        time.sleep(0.1)
        ran.append(number)

    benchmark = Benchmark("vsp", tmp_path, short=True, jobs=1)
    with pytest.raises(SystemExit, match="exit code 3"):
        benchmark.together([fail, *(partial(take, number) for number in range(50))])
    assert len(ran) < 25


def answer(row: int, arm: str, scores: Scores) -> Answer:
    latents = {"num_blocks": 1, "num_latents": 1, "num_replaced": 1, "latents_at": [0]}
    what = {"number": row, "where": f"rows:{row}", "arm": arm, "sample": 0, "text": "", "num_tokens": 1}
    return Answer(**what, **latents, complete=arm == "own", scores=scores)


def write_steps(benchmark: Benchmark, seed: int, arm: str, stage: str, seconds: list[float]) -> None:
    folder = benchmark.run_of(seed, arm, stage)
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step_s": step}) + "\n" for step in seconds))


def test_equal_seconds_and_the_answers_of_all_arms(tmp_path: Path) -> None:
    """As many steps of text as fit into the seconds of both stages; answers are read by arm and replacement."""
    benchmark = Benchmark("vsp", tmp_path, short=False, jobs=1)
    write_steps(benchmark, 0, "text", "text", [9.0, *[0.5] * 20, 3.0])  # the first one warms up, the last is disturbed
    write_steps(benchmark, 0, "latents", "stage1", [1.0] * 20)
    write_steps(benchmark, 0, "latents", "stage2", [2.0] * 20)
    assert benchmark.steps_of_equal_seconds(1) == (1.0 * 20 + 2.0 * 20) / 0.5
    write_steps(benchmark, 1, "text", "text", [0.75] * 22)
    write_steps(benchmark, 1, "latents", "stage1", [0.5] * 20)  # seed 0 was disturbed all the time
    write_steps(benchmark, 1, "latents", "stage2", [3.0] * 20)
    assert benchmark.steps_of_equal_seconds(2) == (0.5 * 20 + 2.0 * 20) / 0.5
    benchmark.parts.once("seed 0, text_seconds, text", [], lambda: None)  # by a start with one seed
    write_steps(benchmark, 0, "text_seconds", "text", [0.5] * 120)
    assert benchmark.steps_of_equal_seconds(2) == 120
    for arm in (*TEXT_ARMS, *OVERRIDES):
        latents = ("own",) if arm in TEXT_ARMS else ("own", "mean")
        lines = [
            answer(row, fed, {"strict": Outcome(fed == "own" and row == 0, ""), "reference": Outcome(True, "")})
            for fed in latents
            for row in range(2)
        ]
        path = benchmark.answers_of(0, arm, "text" if arm in TEXT_ARMS else "stage2")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in lines))
    found = benchmark.answers(1, ("text", "gray"))
    assert {latents: replaced.solved for latents, replaced in found["text"].items()} == {"own": [[True, False]]}
    solved = {latents: replaced.solved for latents, replaced in found["gray"].items()}
    assert solved == {"own": [[True, False]], "mean": [[False, False]]}
    assert found["gray"]["mean"].num_cut_off == 2
