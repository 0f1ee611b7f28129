"""What a save does where the disk does not do its part, over an engine that stands in; see also test_background.py."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import damages
import pytest
import torch

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.save import Saves
from mirage_ds.checkpoint.writer import Writer
from mirage_ds.errors import CheckpointError
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed


class Engine:
    """Writes one file, by DeepSpeed's way."""

    module, device, checkpoint_engine = torch.nn.Linear(30, 20), torch.device("cpu"), SimpleNamespace()

    def save_checkpoint(self, folder: str, tag: str, **more: Any) -> None:
        (Path(folder) / tag).mkdir(parents=True)
        self.checkpoint_engine.save(self.module.state_dict(), f"{folder}/{tag}/states.pt")


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"world_size": 1, "rank": 0, "is_main": True}.items():
        monkeypatch.setattr(distributed, name, lambda value=value: value)
    monkeypatch.setattr(distributed, "max_over_ranks", lambda values, device: values)
    monkeypatch.setattr(distributed, "gather", lambda value: [value])


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize("verify", ["none", "read_back"])
def test_files_are_read_back_if_the_run_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool, verify: str
) -> None:
    """The disk stores something else than what is written. The writer, a fork, has the same disk."""
    sync = os.fsync

    def spoil(descriptor: int) -> None:
        sync(descriptor)
        file = Path(f"/proc/self/fd/{descriptor}").resolve()
        if file.suffix == ".pt":
            content = file.read_bytes()
            middle = len(content) // 2
            file.write_bytes(content[:middle] + b"spoiled" + content[middle + 7 :])

    monkeypatch.setattr(os, "fsync", spoil)
    writer = Writer() if in_background else None
    config = damages.configuration(tmp_path, 2)
    config = config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"verify": verify})})
    saves = Saves(Engine(), config, {}, writer=writer)

    def save() -> None:
        saves.save(TrainState(1, 1), wait=False)
        saves.finish()

    if verify == "read_back":
        with pytest.raises(CheckpointError, match=r"rank 0: states\.pt: what was read back differs.*mode=blocking if"):
            save()
        assert not complete.tags(tmp_path / "checkpoints")
    else:
        save()
        assert complete.wrong_content(tmp_path / "checkpoints" / "global_step1")
    if writer is not None:
        writer.end()


def test_a_folder_that_cannot_be_read_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """While old checkpoints are looked for, on rank 0 alone; the save is complete, and so is the next one."""

    def stale(folder: Path) -> list[Path]:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder)

    monkeypatch.setattr(complete, "tags", stale)
    saves = Saves(Engine(), damages.configuration(tmp_path, 1), {})
    for step in (1, 2):
        saves.save(TrainState(step, step), wait=True)
    folder = tmp_path / "checkpoints"
    assert all(complete.wrong_content(folder / f"global_step{step}") is None for step in (1, 2))
    assert (
        f"old checkpoints were not deleted ({folder}): Stale file handle; the run continues" in capfd.readouterr().err
    )
