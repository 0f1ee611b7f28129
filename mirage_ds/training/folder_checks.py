"""What a run writes, and the counts of its shards: refused before torch is loaded. No torch."""

from mirage_ds.checkpoint import complete
from mirage_ds.config import Config, RunConfig
from mirage_ds.data.shards import ShardFolder
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.paths import check_writable


def not_counted(config: Config, folder: ShardFolder) -> DataError:
    """The error of a run with packed rows whose samples were not counted."""
    data, model = config.data, config.model.path
    return DataError(
        f"data.packing needs the tokens of every sample, which were not counted (data.shards={folder.place}, "
        f"model.path={model}, data.system_turn={data.system_turn}); expected a file that `mirage-data count` wrote for "
        f"this tokenizer; run mirage-data count {folder.place} --model {model}"
        + ("" if data.system_turn else " --no-system-turn")
    )


def check_folder_is_free(run: RunConfig) -> None:
    """A run that does not resume needs a folder without a checkpoint; a start that saved none leaves it free.

    Every rank checks before it joins the others, and rank 0 writes there only after all have joined.

    Raises:
        ConfigError: the folder holds a run.
        DataError: it cannot be written, which a colleague's run may be.
    """
    if run.resume == "never" and complete.tags(run.dir / complete.FOLDER):
        raise ConfigError(
            f"the folder holds another run already (run.dir={run.dir}); a run needs a folder of its own; set run.dir "
            "to a new one, or run.resume=auto to resume that run"
        )


def check_folders_are_writable(config: Config) -> None:
    """Whether this user may write the run's folder, its checkpoints and its targets, which may be on other disks.

    Raises:
        DataError: with the system's reason.
    """
    for folder in (config.run.dir, config.run.dir / complete.FOLDER):
        check_writable(folder, "run.dir")
    if config.model.cache_targets is not None:
        check_writable(config.model.cache_targets, "model.cache_targets")
