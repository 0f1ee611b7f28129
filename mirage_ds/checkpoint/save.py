"""Writes a checkpoint: everything that a run needs to resume (engine, position, random state, configuration).

RUN/checkpoints/global_step20/...        DeepSpeed's files, with each rank's random state
RUN/checkpoints/global_step20/run.json   step, position, ranks, configuration, the manifest's digest
RUN/checkpoints/global_step20/files.json names, sizes and sha256 of all these; see complete.py
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.complete import FOLDER
from mirage_ds.checkpoint.facts import FACTS_NAME
from mirage_ds.checkpoint.find import newest_complete
from mirage_ds.config import Config
from mirage_ds.errors import CheckpointError
from mirage_ds.housekeeping import housekeeping
from mirage_ds.train_state import TrainState
from mirage_ds.zero3 import distributed
from mirage_ds.zero3.engine import whole_numel

ADAM_BYTES = 12  # per trained element, all float32: the master and AdamW's two moments


class Writer(TorchCheckpointEngine):
    """Writes this rank's files for DeepSpeed, and verifies each.

    Keeps an error instead of raising it, so that this rank stays in DeepSpeed's collectives and all ranks end together.
    """

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, Any]] = {}  # as in files.json
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        file = Path(path)
        try:
            torch.save(state_dict, file)
            self.files[file.name] = complete.check_written(file)
        except (OSError, RuntimeError) as error:
            # torch's C++ writer raises RuntimeError for a system error, without its code.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            self.error = f"{file.name}: {error}"
            file.unlink(missing_ok=True)


def save(engine: DeepSpeedEngine, config: Config, state: TrainState, facts: dict[str, Any]) -> Path:
    """Writes a checkpoint of all ranks and returns its folder; deletes the oldest beyond `checkpoint.keep_latest_k`.

    The folder's name ends with .part until every rank's files are on disk and verified.

    Raises:
        CheckpointError: on every rank: there is no room for it, or a rank could not write its files.
    """
    started_s = time.monotonic()
    folder, tag = config.run.dir / FOLDER, f"global_step{state.step}"
    part = folder / (tag + complete.PART)
    _on_main(part, lambda: complete.remove_parts(folder))
    check_room(config.run.dir, engine.module, engine.device)
    original, writer = engine.checkpoint_engine, Writer()
    engine.checkpoint_engine = writer
    try:
        client_state = {"random": random_state()}
        engine.save_checkpoint(str(folder), tag=part.name, client_state=client_state, save_latest=False)
    finally:
        engine.checkpoint_engine = original
    outcomes = distributed.gather((writer.files, writer.error))
    _raise_failure(part, [error for _, error in outcomes])
    files = {name: entry for own, _ in outcomes for name, entry in own.items()}
    position = {"step": state.step, "position": state.position}
    _on_main(part, lambda: _make_current(part, position | facts, files, config.checkpoint.keep_latest_k))
    if distributed.is_main():
        size, passed_s = complete.total_bytes(files.values()), time.monotonic() - started_s
        rate = size / 1e6 / passed_s
        print(f"Saved {folder / tag}: {size / 1e6:.1f} MB in {passed_s:.1f} s, {rate:.1f} MB/s", flush=True)
    return folder / tag


def _make_current(part: Path, facts: dict[str, Any], files: dict[str, dict[str, Any]], keep_latest_k: int) -> None:
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
    complete.prune(final.parent, facts["step"], keep_latest_k)


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
        f"user's quota; {_remedy(part.parents[1])}"
    )


def size_in_bytes(model: torch.nn.Module) -> int:
    """Bytes of a checkpoint of all ranks, up to some KiB: trained parameters with AdamW's state, and frozen parameters.

    Under ZeRO-3 every rank writes its shards of both.
    """
    return sum(
        whole_numel(parameter) * (ADAM_BYTES if parameter.requires_grad else parameter.element_size())
        for parameter in model.parameters()
    )


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
