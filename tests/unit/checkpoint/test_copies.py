"""Copies of checkpoints in a second folder: complete, pruned like the checkpoints, and an error is only printed."""

import shutil
from pathlib import Path

import pytest
from zero3_files import complete_by_hand

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.copies import Copies
from mirage_ds.checkpoint.find import find_named


def write(folder: Path, step: int) -> Path:
    path = folder / f"global_step{step}"
    path.mkdir(parents=True)
    (path / "run.json").write_text(f'{{"step": {step}}}')
    complete_by_hand(path)
    return path


def test_copies_are_complete_and_pruned_and_can_be_copied_back(tmp_path: Path) -> None:
    run, place = tmp_path / "run", tmp_path / "second" / "run"
    (place / "global_step7.part").mkdir(parents=True)  # of a killed attempt
    copies = Copies(place, keep_latest_k=2)
    for step in (5, 10, 15):
        copies.add(write(run / "checkpoints", step))
    copies.wait()
    assert {path.name for path in place.iterdir()} == {"global_step10", "global_step15"}
    shutil.rmtree(run)
    shutil.copytree(place / "global_step15", run / "checkpoints" / "global_step15")
    assert find_named(run).name == "global_step15"


def test_a_failed_copy_does_not_end_the_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    copies = Copies(Path("/dev/null/place"), keep_latest_k=2)
    copies.add(write(tmp_path, 5))
    copies.wait()
    assert "WARNING" in capfd.readouterr().err

    copies = Copies(tmp_path / "place", keep_latest_k=2)
    (tmp_path / "global_step5" / "run.json").write_text("")  # or pruned meanwhile
    copies.add(tmp_path / "global_step5")
    copies.wait()
    assert "run.json has size 0, expected 11 bytes" in capfd.readouterr().err
    assert not complete.tags(tmp_path / "place")
    assert not list((tmp_path / "place").iterdir())
