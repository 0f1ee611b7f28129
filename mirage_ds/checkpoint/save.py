"""Saves checkpoints: everything that a run needs to resume (engine, position, random state, configuration).

RUN/checkpoints/global_step20/...        DeepSpeed's files, with each rank's random state
RUN/checkpoints/global_step20/run.json   step, position, ranks, configuration, the manifest's digest
RUN/checkpoints/global_step20/files.json names, sizes and sha256 of all these; see complete.py

Every rank writes its own files: its writer process (writer.py), while training continues, or the rank itself. When all
ranks have written theirs, rank 0 completes the checkpoint.
"""

import json
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.complete import FOLDER
from mirage_ds.checkpoint.copies import Copies
from mirage_ds.checkpoint.facts import FACTS_NAME
from mirage_ds.checkpoint.find import newest_complete
from mirage_ds.checkpoint.writer import Writer
from mirage_ds.checkpoint.written import Written, write_states
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.housekeeping import housekeeping
from mirage_ds.model.lora import has_adapter
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import whole_numel

ADAM_BYTES = 12  # per trained element, all float32: the master and AdamW's two moments


class Progress(IntEnum):
    """How far one rank is with the save under way; the largest value of the ranks holds for all of them."""

    DONE = 0  # or no save is under way
    WRITING = 1
    FAILED = 2


@dataclass
class UnderWay:
    """A save whose files are being written."""

    part: Path  # the folder
    state: TrainState
    started_s: float
    waited_s: float = 0.0  # that training waited for it
    written: Written | None = None  # this rank's files; None while they are being written


class Saves:
    """Saves a run's checkpoints, at most one at a time. Every rank makes the same calls."""

    def __init__(
        self,
        engine: DeepSpeedEngine,
        config: Config,
        facts: dict[str, Any],
        *,
        writer: Writer | None = None,
        copies: Copies | None = None,
    ) -> None:
        """
        Args:
            facts: what run.json says besides step and position, see `describe_run`.
            writer: writes while training continues; without one, `save` returns when all is written.
            copies: gets each complete checkpoint, on rank 0.
        """
        self.engine, self.config, self.facts = engine, config, facts
        self.writer, self.copies = writer, copies
        self.under_way: UnderWay | None = None
        self.last_step: int | None = None  # the last one that was begun
        # Deletes old checkpoints, on rank 0: the system takes longer for some GB than for their copy to host memory.
        self.pruner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="deletion of old checkpoints")
        self.pruned: Future[None] | None = None

    def save(self, state: TrainState, *, wait: bool) -> None:
        """Saves this step, after the end of a save that is under way.

        With a writer and without `wait`, it returns when the state is copied: the run may change it, and calls `finish`
        once `progress` says so. Otherwise the checkpoint is complete when it returns, and the oldest one beyond
        `checkpoint.keep_latest_k` is deleted. The folder's name ends with .part until then.

        Raises:
            CheckpointError: on every rank: there is no room for it, or a rank could not write its files.
        """
        self.finish()
        folder = self.config.run.dir / FOLDER
        part = folder / f"global_step{state.step}{complete.PART}"
        save = UnderWay(part, TrainState(state.step, state.position), time.monotonic())
        self._wait_for_room()
        _on_main(part, lambda: complete.remove_parts(folder))
        check_room(self.config.run.dir, self.engine.module, self.engine.device)
        states, read_back = engine_states(self.engine, part), self.config.checkpoint.verify == "read_back"
        wait = wait or self.writer is None
        if self.writer is None or wait:
            save.written = write_states(part, states.items(), read_back=read_back)
        else:
            self.writer.begin(part, states, read_back=read_back)
        save.waited_s = time.monotonic() - save.started_s
        self.under_way, self.last_step = save, state.step
        if wait:
            self.finish()
            self._wait_for_room()

    def progress(self) -> Progress:
        """How far this rank is."""
        save = self.under_way
        if save is None:
            return Progress.DONE
        if save.written is None and self.writer and self.writer.is_done():
            save.written = self.writer.wait()
        if save.written is None:
            return Progress.WRITING
        return Progress.FAILED if save.written.error else Progress.DONE

    def finish(self) -> None:
        """Waits for the save under way, if there is one, and completes it.

        Raises:
            CheckpointError: on every rank: a rank could not write its files.
        """
        save, self.under_way = self.under_way, None
        if save is None:
            return
        began_s = time.monotonic()
        if save.written is None and self.writer:
            save.written = self.writer.wait()
        outcomes: list[Written] = distributed.gather(save.written)
        _raise_failure(save.part, [written.error for written in outcomes])
        files = {name: entry for written in outcomes for name, entry in written.files.items()}
        facts = {"step": save.state.step, "position": save.state.position} | self.facts
        _on_main(save.part, lambda: _make_current(save.part, facts, files))
        save.waited_s += time.monotonic() - began_s
        if distributed.is_main():
            final, keep = save.part.with_suffix(""), self.config.checkpoint.keep_latest_k
            self.pruned = self.pruner.submit(complete.prune, final.parent, save.state.step, keep)
            size, passed_s = complete.total_bytes(files.values()), time.monotonic() - save.started_s
            print(
                f"Saved {final}: {size / 1e6:.1f} MB in {passed_s:.1f} s, {size / 1e6 / passed_s:.1f} MB/s; "
                f"training waited {save.waited_s:.1f} s",
                flush=True,
            )
            if self.copies is not None:
                self.copies.add(final)

    def _wait_for_room(self) -> None:
        """Until the checkpoints that the last one replaced are deleted."""
        if self.pruned is not None:
            self.pruned.result()


class States(TorchCheckpointEngine):
    """Keeps what DeepSpeed would write on this rank, by file name; the tensors are the engine's own."""

    def __init__(self) -> None:
        super().__init__()
        self.by_name: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.by_name[Path(path).name] = state_dict


def engine_states(engine: DeepSpeedEngine, part: Path) -> dict[str, Any]:
    """What this rank has to write into `part`, which DeepSpeed makes, by file name; valid until the next step."""
    original, states = engine.checkpoint_engine, States()
    engine.checkpoint_engine = states
    try:
        client_state = {"random": random_state()}
        engine.save_checkpoint(
            str(part.parent),
            tag=part.name,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=has_adapter(engine.module),
        )
    finally:
        engine.checkpoint_engine = original
    return states.by_name


def _make_current(part: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]]) -> None:
    """Completes the checkpoint on rank 0, once every rank has written its `files`."""
    own = part / FACTS_NAME
    own.write_text(json.dumps(facts, indent=2) + "\n")
    listing = files | {FACTS_NAME: complete.describe_file(own)}
    (part / complete.FILES_NAME).write_text(json.dumps(listing, indent=2, sort_keys=True) + "\n")
    final = complete.publish(part)
    latest = final.parent / "latest.new"
    with housekeeping(f"`latest` was not written ({final.parent})", "only DeepSpeed's own tools read it"):
        latest.write_text(final.name)
        latest.replace(final.parent / "latest")


def _on_main(part: Path, action: Callable[[], None]) -> None:
    """Runs `action` on rank 0 while all ranks wait for it.

    Raises:
        CheckpointError: on every rank, if the system refused.
    """
    error = None
    if distributed.is_main():
        try:
            action()
        except OSError as refused:
            error = str(refused)
    _raise_failure(part, distributed.gather(error))


def _raise_failure(part: Path, errors: list[str | None]) -> None:
    """Deletes the checkpoint and raises if a rank could not write it; `errors` has one entry per rank."""
    failed = {rank: error for rank, error in enumerate(errors) if error}
    if not failed:
        return
    if distributed.is_main():
        shutil.rmtree(part, ignore_errors=True)
    rank, error = next(iter(failed.items()))
    raise CheckpointError(
        f"the checkpoint could not be written ({part}): rank {rank}: {error}; it needs space on the disk and in the "
        f"user's quota, and memory for the processes that write it; {_remedy(part.parents[1])}, or set "
        "checkpoint.mode=blocking if host memory is short"
    )


def size_in_bytes(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint of all ranks, up to some KiB: trained parameters with AdamW's state, and frozen parameters
    but those of an adapter's base.

    Under ZeRO-3 every rank writes its shards of both.
    """
    return sum(whole_numel(parameter) * element_bytes for parameter, element_bytes in _saved(model))


def own_bytes(model: torch.nn.Module) -> int:
    """At most so many bytes of tensors are in this rank's files: its shards, and small ones such as random states."""
    shards = (
        getattr(parameter, "ds_tensor", parameter).numel() * element_bytes for parameter, element_bytes in _saved(model)
    )
    return sum(shards) + 2**20


def _saved(model: torch.nn.Module) -> list[tuple[torch.nn.Parameter, int]]:
    """The parameters that a checkpoint contains, and the bytes that it has of an element of each."""
    frozen = not has_adapter(model)
    return [
        (parameter, ADAM_BYTES if parameter.requires_grad else parameter.element_size())
        for parameter in model.parameters()
        if parameter.requires_grad or frozen
    ]


def check_room(run_dir: Path, model: torch.nn.Module, device: torch.device) -> None:
    """Refuses to start a checkpoint that does not fit on the disk; every rank must call it, and all agree.

    Raises:
        CheckpointError: there is too little space; the message has the folder and both sizes.
    """
    folder = (run_dir / FOLDER).absolute()  # may be a link to a larger disk
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free + complete.parts_bytes(run_dir / FOLDER)  # save deletes these first
    needed = size_in_bytes(model)
    if any(distributed.max_over_ranks([free < needed], device)):
        raise CheckpointError(
            f"no room for a checkpoint ({run_dir / FOLDER}): it needs {needed / 1e6:.1f} MB, and "
            f"{free / 1e6:.1f} MB are free; the disk must hold one checkpoint more than checkpoint.keep_latest_k; "
            f"{_remedy(run_dir)}"
        )


def _remedy(run_dir: Path) -> str:
    """What to do about a full disk."""
    found = newest_complete(run_dir)
    if found is None:
        return "free some space, or set run.dir to a folder on another disk, and start again"
    return f"free some space, and resume from {found.name}, which is complete, with run.resume=auto"


def random_state() -> dict[str, torch.Tensor]:
    """The states of this rank's random generators, by device type."""
    accelerator = get_accelerator()
    return {"cpu": torch.get_rng_state(), accelerator.device_name(): accelerator.get_rng_state()}
