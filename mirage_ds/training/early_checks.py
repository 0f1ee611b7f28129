"""The trainer's command line, and what can be refused before torch is loaded: that takes seconds, these checks none."""

import argparse
from pathlib import Path

from mirage_ds.checkpoint import complete
from mirage_ds.config import Config, RunConfig
from mirage_ds.data.shards import load_manifest
from mirage_ds.errors import ConfigError, DataError, MirageError, leave
from mirage_ds.model_folder import check_model
from mirage_ds.owner import refuse_living
from mirage_ds.paths import check_temporary_folder, check_writable
from mirage_ds.recipe import load_config


def read_command_line() -> Config:
    """The configuration that this process was started with. After a mistake the process ends with exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mirage_ds.train", description="Trains one run.", allow_abbrev=False
    )
    parser.add_argument("recipe", type=Path, help="a YAML recipe, for example one of launch/recipes/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values in YAML")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # set by DeepSpeed's launcher
    options = parser.parse_intermixed_args()
    try:
        config = load_config(options.recipe, options.overrides)
        check_inputs(config)
        check_folder_is_free(config.run)
        check_folders_are_writable(config)
        refuse_living(config.run.dir)
    except MirageError as error:
        leave(error)
    return config


def check_inputs(config: Config) -> None:
    """What the run reads must be reachable from this machine.

    Raises:
        MirageError: shards, their counts, the model's folder or the run to start from are missing here.
    """
    for folder in (config.data.shards, config.evaluation.shards):
        if folder is not None:
            load_manifest(folder)
    if config.data.packing and not any(config.data.shards.glob("tokens-*.npz")):
        raise not_counted(config)  # for another tokenizer: found as soon as that can be loaded
    check_model(config.model.path, f"model.path={config.model.path}", config.model.cache_dir)
    if config.data.num_workers:
        check_temporary_folder()
    resumes = config.run.resume != "never" and complete.tags(config.run.dir / complete.FOLDER)
    if config.run.init_from is not None and not resumes and not config.run.init_from.is_dir():
        raise DataError(
            f"the run to start from does not exist (run.init_from={config.run.init_from}); allowed: the folder of a "
            "run with a checkpoint; set run.init_from"
        )


def not_counted(config: Config) -> DataError:
    """The error of a run with packed rows whose samples were not counted."""
    data, model = config.data, config.model.path
    return DataError(
        f"data.packing needs the tokens of every sample, which were not counted (data.shards={data.shards}, "
        f"model.path={model}, data.system_turn={data.system_turn}); expected a file that `mirage-data count` wrote for "
        f"this tokenizer; run mirage-data count {data.shards} --model {model}"
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
