"""Finds a checkpoint: the newest complete one of a run, or the one that a user names."""

from pathlib import Path

from mirage_ds.checkpoint import complete
from mirage_ds.checkpoint.complete import FOLDER
from mirage_ds.checkpoint.facts import FACTS_NAME
from mirage_ds.errors import CheckpointError
from mirage_ds.zero3 import distributed


def newest_complete(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run that is complete by file names and sizes, or None."""
    return next((path for path in complete.tags(run_dir / FOLDER) if complete.wrong_size(path) is None), None)


def find_undamaged(run_dir: Path) -> Path | None:
    """The newest undamaged checkpoint of a run, or None if it never saved one; skips damaged ones with a warning.

    Every rank must call it, and all get the same answer. Each rank verifies its share of the files.

    Raises:
        CheckpointError: there are checkpoints, and all are damaged.
    """
    found = distributed.gather(complete.tags(run_dir / FOLDER))[0]  # as rank 0 sees the folder
    for checkpoint in found:
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint
        if distributed.is_main():
            print(f"WARNING: {checkpoint} is damaged and skipped: {damage}", flush=True)
    if found:
        raise CheckpointError(
            f"all checkpoints of the run are damaged ({run_dir / FOLDER}): {', '.join(path.name for path in found)}; "
            "a run can only resume from an undamaged one; copy one there again (from checkpoint.copy_to, if it was "
            "set), or start from scratch with another run.dir"
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, by file names, sizes and sha256, or None; a collective call of all ranks."""
    own = slice(distributed.rank(), None, distributed.world_size())
    damages = distributed.gather(complete.wrong_size(checkpoint) or complete.wrong_content(checkpoint, own))
    return next((damage for damage in damages if damage), None)


def require_latest(run_dir: Path) -> Path:
    """The last checkpoint of a run that must have one; complete by file names and sizes.

    Raises:
        CheckpointError: there is none, or it is damaged: an earlier one would have other weights than the user expects.
    """
    found = complete.tags(run_dir / FOLDER)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint ({run_dir / FOLDER}); expected the folder of a run that has saved one; give that "
            "run's run.dir, or train it first"
        )
    refuse_damaged(found[0], complete.wrong_size(found[0]))
    return found[0]


def refuse_damaged(checkpoint: Path, damage: str | None) -> None:
    """Refuses a damaged checkpoint that a user named.

    Raises:
        CheckpointError: `damage` is not None.
    """
    if damage is not None:
        raise CheckpointError(
            f"the checkpoint is damaged ({checkpoint}): {damage}; expected the files that the run wrote; copy it "
            "there again, name another one, or delete it to use the one before it"
        )


def find_named(path: Path) -> Path:
    """The checkpoint that a user names by its own folder, or by its run's folder as the run's last one; undamaged.

    Raises:
        CheckpointError: neither exists, or a file of it is missing or differs from what the run wrote.
    """
    found = [path] if (path / FACTS_NAME).is_file() else complete.tags(path / FOLDER)
    if not found:
        raise CheckpointError(
            f"no complete checkpoint ({path}); expected the folder of a run that has saved one, or one checkpoint in "
            f"it, {FOLDER}/global_stepN with its run.json; name one of these"
        )
    refuse_damaged(found[0], complete.wrong_size(found[0]) or complete.wrong_content(found[0]))
    return found[0]
