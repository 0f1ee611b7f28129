"""A full disk, a real tmpfs of some MB: the message, and that earlier output stays complete.

Two starts see more free space than there is, as with a quota, so that the disk fills up while a checkpoint is written.
Skips where this user may not mount a tmpfs in a namespace.
"""

import shutil
from pathlib import Path
from typing import NamedTuple

import launching
import pytest
import small_disk
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from generated_rows import write_jsonl, write_rows

from data_tools.build import build
from mirage_ds.checkpoint.facts import read_facts
from mirage_ds.checkpoint.find import find_named, newest_complete
from mirage_ds.checkpoint.save import size_in_bytes
from mirage_ds.errors import DiskFullError, name_full_disk
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
SPARE_BYTES = 16 * 1024  # left free on a full disk, so that writing can start


class Outcome:
    """The exit code, output and files of a start."""

    def __init__(self, place: Path, name: str, code: int) -> None:
        self.code, self.output = code, (place / f"{name}.log").read_text()
        self.disk = place / f"{name}.disk"

    @property
    def run(self) -> Path:
        return self.disk / "run"

    def check_message(self, *parts: str) -> None:
        assert self.code == 2, self.output
        assert "Traceback" not in self.output
        for part in parts:
            assert part in self.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("full")


@pytest.fixture(scope="module")
def checkpoint_bytes(place: Path) -> int:
    rows = write_rows(place / "rows", 10)
    write_tiny(rows, place / "model", seed=0)
    build(rows, place / "shards", maxcount=4, maxsize=10**9)
    return size_in_bytes(load_backbone(str(place / "model"), dtype=torch.float32).hf)


@pytest.fixture(scope="module")
def outcomes(place: Path, checkpoint_bytes: int) -> dict[str, Outcome]:
    """One checkpoint fits on the disk, two do not."""
    if not small_disk.may_mount():
        pytest.skip("this user may not mount a tmpfs in a namespace")
    disk, folder = place / "disk", place / "cwd"
    disk.mkdir()
    folder.mkdir()
    found = {}
    with small_disk.SmallDisk(disk, int(1.6 * checkpoint_bytes)) as small:
        for name, (arguments, spare_bytes, hides_shortage) in starts(place, disk).items():
            if spare_bytes is not None:
                small.fill(spare_bytes)
            log = place / f"{name}.log"
            with launching.start(
                1, small.pid, hides_shortage, *arguments, main=small_disk.run, log=log, cwd=folder
            ) as start:
                code = start.wait(timeout_s=300)
            shutil.copytree(small.outside, place / f"{name}.disk")
            small.empty()
            found[name] = Outcome(place, name, code)
    return found


class Start(NamedTuple):
    """A command on the small disk."""

    arguments: list[str]
    spare_bytes: int | None  # that are left free on the disk; None: all
    hides_shortage: bool = False  # more free space than that is seen, as with a quota


def starts(place: Path, disk: Path) -> dict[str, Start]:
    run = [
        str(RECIPE),
        f"run.dir={disk}/run",
        f"model.path={place}/model",
        f"data.shards={place}/shards",
        "data.num_workers=0",
        "checkpoint.interval=1",
        "run.resume=auto",
    ]
    rows = [{"text_input": "?", "map_desc": [[1, 2], [0, 0]], "note": "long " * 1000} for _ in range(20)]
    questions = write_jsonl(place / "questions.jsonl", rows)
    model = ["--model", f"{place}/model", "--latent-size", "2", "--max-new-tokens", "2", "--batch-size", "5"]
    evaluation = ["--task", "vsp-spatial-planning", "--data", str(questions), "--output", f"{disk}/results"]
    vsp = ["--output", f"{disk}/vsp", "--num-train", "30", "--num-test", "2", "--levels", "3"]
    export = ["--checkpoint", f"{disk}/run", "--output", f"{disk}/model"]
    return {
        "build": Start(["build", "--input", f"{place}/rows/rows.jsonl", "--output", f"{disk}/new"], SPARE_BYTES),
        "make-vsp": Start(["make-vsp", *vsp], SPARE_BYTES),
        "init": Start(["init", "--from", f"{place}/model", "--output", f"{disk}/copy"], SPARE_BYTES),
        "no room at the start": Start(run, SPARE_BYTES),
        "second checkpoint": Start(run, None),
        "no room to export": Start(["export", *export], SPARE_BYTES),
        "export": Start(["export", *export], SPARE_BYTES, hides_shortage=True),
        "evaluate": Start(["evaluate", *model, *evaluation], SPARE_BYTES),
        "while writing": Start(run, None, hides_shortage=True),
        "metrics": Start([*run, "checkpoint.interval=0"], 0, hides_shortage=True),
    }


def check_undamaged(run: Path, checkpoint_bytes: int) -> None:
    """The newest checkpoint is step 1, and it is undamaged."""
    found = newest_complete(run)
    assert found == run / "checkpoints" / "global_step1"
    assert find_named(run) == found  # sha256 verified
    assert read_facts(found / "run.json")["step"] == 1
    state = get_fp32_state_dict_from_zero_checkpoint(str(found.parent), tag=found.name)
    assert all(tensor.isfinite().all() for tensor in state.values())
    size = sum(path.stat().st_size for path in found.iterdir())
    assert size == pytest.approx(checkpoint_bytes, rel=0.05)


@pytest.mark.parametrize(("name", "output"), [("build", "new"), ("make-vsp", "vsp"), ("init", "copy")])
def test_a_new_folder_is_not_left_in_part(outcomes: dict[str, Outcome], place: Path, name: str, output: str) -> None:
    outcomes[name].check_message(f"the disk is full ({place}/disk", "free some space")
    assert [path.name for path in outcomes[name].disk.iterdir()] == ["filler"]


def test_an_export_without_room_does_not_start(outcomes: dict[str, Outcome], place: Path) -> None:
    outcomes["no room to export"].check_message(f"no room for the output ({place}/disk/model)", "free some space")
    assert {path.name for path in outcomes["no room to export"].disk.iterdir()} == {"filler", "run"}


def test_an_export_is_not_left_in_part(outcomes: dict[str, Outcome], place: Path) -> None:
    outcomes["export"].check_message(f"the disk is full ({place}/disk", "nothing of model was kept", "free some space")
    assert {path.name for path in outcomes["export"].disk.iterdir()} == {"filler", "run"}


def test_results_are_not_left_in_part_under_their_name(outcomes: dict[str, Outcome], place: Path) -> None:
    outcomes["evaluate"].check_message(f"the disk is full ({place}/disk)", "free some space; a new start continues")
    assert not (outcomes["evaluate"].disk / "results").exists()


def test_a_run_whose_checkpoint_has_no_room_does_not_start(outcomes: dict[str, Outcome], place: Path) -> None:
    outcome = outcomes["no room at the start"]
    outcome.check_message(
        f"no room for a checkpoint ({place}/disk/run/checkpoints)",
        "keep_latest_k",
        "set run.dir to a folder on another",
    )
    assert not outcome.run.exists()


def test_no_room_for_the_next_checkpoint(outcomes: dict[str, Outcome], place: Path, checkpoint_bytes: int) -> None:
    outcome = outcomes["second checkpoint"]
    outcome.check_message(
        f"no room for a checkpoint ({place}/disk/run/checkpoints): it needs {checkpoint_bytes / 1e6:.1f} MB",
        "free some space, and resume from global_step1, which is complete, with run.resume=auto",
    )
    check_undamaged(outcome.run, checkpoint_bytes)
    assert not (outcome.run / "checkpoints" / "global_step2").exists()


def test_the_disk_fills_up_while_a_checkpoint_is_written(outcomes: dict[str, Outcome], checkpoint_bytes: int) -> None:
    outcome = outcomes["while writing"]
    outcome.check_message("Resuming from", "the checkpoint could not be written (", "resume from global_step1")
    check_undamaged(outcome.run, checkpoint_bytes)
    assert not list((outcome.run / "checkpoints").glob("global_step2*"))


def test_the_disk_fills_up_while_metrics_are_written(
    outcomes: dict[str, Outcome], place: Path, checkpoint_bytes: int
) -> None:
    outcome = outcomes["metrics"]
    outcome.check_message(f"the disk is full ({place}/disk/run", "free some space, and start again")
    check_undamaged(outcome.run, checkpoint_bytes)
    assert (outcome.run / "metrics.jsonl").read_text() == (outcomes["while writing"].run / "metrics.jsonl").read_text()


def test_other_errors_of_the_system_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), name_full_disk(tmp_path, "free some space"):
        (tmp_path / "nothing").read_text()
    with (
        pytest.raises(DiskFullError, match=rf"the disk is full \({tmp_path}\): .*No space left .*; free some space"),
        name_full_disk(tmp_path, "free some space"),
        Path("/dev/full").open("w") as file,
    ):
        file.write("text")
