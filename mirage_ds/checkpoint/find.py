"""Which checkpoint is meant: the newest complete one of a run, or the one that a user names."""

from pathlib import Path

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.complete import FOLDER
from mirage_ds.checkpoint.facts import FACTS_NAME
from mirage_ds.errors import CheckpointError
from mirage_ds.zero3 import distributed


def newest_complete(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is complete by names and sizes, if it has one."""
    return next((path for path in complete.tags(run_dir / FOLDER) if complete.wrong_size(path) is None), None)


def find_undamaged(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None if it never saved one; damaged ones are named and passed over.

    Every rank calls it, and all get the same answer, whatever their number: they share the reading of the files.

    Raises:
        CheckpointError: there are checkpoints, and none is whole.
    """
    found = distributed.gather(complete.tags(run_dir / FOLDER))[0]  # as rank 0 sees the folder
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if distributed.is_main():
            print(f"WARNING: {checkpoint} is damaged and passed over: {damage}", flush=True)
    if found:
        raise CheckpointError(
            f"no checkpoint of the run is whole ({run_dir / FOLDER}): {', '.join(path.name for path in found)} are "
            "damaged; a run goes on from a whole one; copy one there again (from checkpoint.copy_to, if it was set), "
            "or start anew with another run.dir"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by names, sizes and sha256; every rank calls it, and all get the same answer."""
    own = slice(distributed.rank(), None, distributed.world_size())
    damages = distributed.gather(complete.wrong_size(checkpoint) or complete.wrong_content(checkpoint, own))
    return next((damage for damage in damages if damage), None)


def require_latest(run_dir: Path) -> Path:
    """The last checkpoint of a run that must have one; it is complete by names and sizes.

    Raises:
        CheckpointError: there is none, or it is damaged: an earlier one has other weights than the user means.
    """
    found = complete.tags(run_dir / FOLDER)
    if not found:
        raise CheckpointError(
            f"there is no complete checkpoint ({run_dir / FOLDER}); allowed is the folder of a run that has saved one; "
            "give that run's run.dir, or run it first"
        )
    refuse_damaged(found[0], complete.wrong_size(found[0]))
    return found[0]


def refuse_damaged(checkpoint: Path, damage: str | None) -> None:
    """Raises:
    CheckpointError: a checkpoint that a user named has a damage.
    """
    if damage is not None:
        raise CheckpointError(
            f"the checkpoint is damaged ({checkpoint}): {damage}; allowed is what the run wrote; copy it there again, "
            "name another one, or delete it to have the one before it taken"
        )


def find_named(path: Path) -> Path:
    """The checkpoint that a user names: itself, or by its run's folder, whose last one it then is. It is whole.

    Raises:
        CheckpointError: neither is there, or a file of it is missing or not what the run wrote.
    """
    found = [path] if (path / FACTS_NAME).is_file() else complete.tags(path / FOLDER)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint ({path}); allowed is a run's folder that has saved one, or one checkpoint "
            f"there, {FOLDER}/global_stepN with its run.json; name one of these"
        )
    refuse_damaged(found[0], complete.wrong_size(found[0]) or complete.wrong_content(found[0]))
    return found[0]
