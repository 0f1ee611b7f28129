"""Random damages: by sha256, two ranks load what they had when they saved the tag that the loader reports."""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import damages
import launching
import pytest

from mirage_ds.checkpoint import complete

pytestmark = pytest.mark.slow

KILLS, DAMAGES = 8, 42


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of damages.py, and the damages to each copy of a run."""
    folder, seed = tmp_path_factory.mktemp("damages"), random.randrange(10**6)
    print("seed", seed)
    result = subprocess.run(
        [sys.executable, damages.__file__, str(folder), str(seed), str(KILLS), str(DAMAGES)],
        env=launching.environment() | {"TORCH_EXTENSIONS_DIR": str(folder / "torch_extensions")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    log = (folder / "log").read_text() if (folder / "log").exists() else ""
    assert result.returncode == 0, f"seed {seed}: {result.stderr[-3000:]} {log[-3000:]}"
    return folder, json.loads(result.stdout.splitlines()[-1])


def check(notes: Path, found: list[dict[str, Any]]) -> None:
    """Both ranks loaded the same tag, with the masters that each had recorded."""
    assert len({rank["tag"] for rank in found}) == 1
    for rank, each in enumerate(found):
        assert (notes / f"{each['tag']}_{rank}").read_text() == each["sha256"], each


def test_killed_while_saving(outcome: tuple[Path, list[str]]) -> None:
    """A repeated step has the same masters, as the run is deterministic."""
    folder, _ = outcome
    loaded = [
        [json.loads(line) for line in (folder / "notes_of_killed" / f"loaded_{rank}").read_text().splitlines()]
        for rank in range(2)
    ]
    last = [json.loads((folder / "notes_of_killed" / f"results_{rank}").read_text())[0] for rank in range(2)]
    starts = [*zip(*loaded, strict=True), tuple(last)]
    assert len(starts) == KILLS + 1
    for start in starts:
        if start != ({}, {}):  # killed before its first checkpoint was complete
            check(folder / "notes_of_killed", list(start))
    assert last != [{}, {}]


def test_random_damages(outcome: tuple[Path, list[str]]) -> None:
    folder, done = outcome
    found = [json.loads((folder / "notes" / f"results_{rank}").read_text()) for rank in range(2)]
    passed_over = 0
    for number, (what, *each) in enumerate(zip(done, *found, strict=True)):
        hurt = {word.split("/")[0] for word in what.split() if "/" in word}
        whole = [tag for tag in ("global_step3", "global_step2", "global_step1") if tag not in hurt]
        if not whole:
            assert all("all checkpoints of the run are damaged" in rank["error"] for rank in each), (number, what)
            continue
        assert [rank["tag"] for rank in each] == [whole[0]] * 2, (number, what)
        check(folder / "notes", list(each))
        passed_over += whole[0] != "global_step3"
    assert passed_over
    log = (folder / "log").read_text()
    assert "global_step3 is damaged and skipped" in log


def test_one_rank_that_cannot_write_ends_all_with_one_message(outcome: tuple[Path, list[str]]) -> None:
    folder, _ = outcome
    first, second = ((folder / f"no_room_{rank}").read_text() for rank in range(2))
    assert first == second
    assert "the checkpoint could not be written (" in first
    assert "rank 1: zero_pp_rank_1_" in first
    assert "resume from global_step3, which is complete" in first
    assert sorted(path.name for path in (folder / "run" / "checkpoints").glob("global_step*")) == [
        "global_step1",
        "global_step2",
        "global_step3",
    ]
    assert complete.wrong_content(folder / "run" / "checkpoints" / "global_step3") is None
