"""Random damages: by sha256, two ranks load what they had when they saved the tag that the loader reports."""

import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import damages
import launching
import pytest

from mirage_ds.checkpoint import complete

pytestmark = pytest.mark.slow

KILLS, DAMAGES = 8, 42


def run_pair(main: Callable[..., None], *arguments: object, log: Path) -> str:
    with launching.start(2, *arguments, main=main, log=log) as pair:
        return pair.finish(timeout_s=300)


def kill_while_saving(folder: Path, rng: random.Random) -> None:
    """SIGKILL to both ranks, one after the other, at random moments from the first save on."""
    notes, log = folder / "notes", folder / "log"
    for _ in range(KILLS):
        (notes / "saving_0").unlink(missing_ok=True)
        with launching.start(2, folder / "killed", notes, 10**6, 2, main=damages.save_steps, log=log) as pair:
            while not (notes / "saving_0").exists():
                assert pair.code is None, log.read_text()[-3000:]
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.6))
            for rank in rng.sample(pair.processes, 2):
                rank.kill()
                rank.join()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder with what the ranks loaded, and the damages to each copy of a run."""
    folder, seed = tmp_path_factory.mktemp("damages"), random.randrange(10**6)
    print("seed", seed)
    rng = random.Random(seed)
    notes, run, log = folder / "notes", folder / "run", folder / "log"
    notes.mkdir()
    kill_while_saving(folder, rng)
    shutil.copytree(notes, folder / "notes_of_killed")
    run_pair(damages.load_all, [folder / "killed"], folder / "notes_of_killed", log=log)
    run_pair(damages.save_steps, run, notes, 3, 3, log=log)
    run_pair(damages.no_room, run, folder, log=log)
    runs, done = [], []
    for number in range(DAMAGES):
        runs.append(folder / f"damaged_{number}")
        shutil.copytree(run, runs[-1])
        done.append(damages.damage(runs[-1], rng))
    run_pair(damages.load_all, runs, notes, log=log)
    return folder, done


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
