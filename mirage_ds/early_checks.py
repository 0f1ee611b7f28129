"""The trainer's command line, and what can be refused before torch is loaded: that takes seconds, these checks none."""

import argparse
from pathlib import Path

from mirage_ds.checkpoint import complete
from mirage_ds.config import Config
from mirage_ds.config_lora import check_peft
from mirage_ds.data.folders import load_folders
from mirage_ds.data.places import LocalPlace, Reading
from mirage_ds.data.remote import longest_wait_s
from mirage_ds.data.shards import load_manifest
from mirage_ds.errors import ConfigError, DataError, MirageError, leave
from mirage_ds.evaluation.training.named import check_named
from mirage_ds.model_folder import check_model
from mirage_ds.owner import refuse_living
from mirage_ds.paths import check_temporary_folder
from mirage_ds.recipe import load_config
from mirage_ds.training.folder_checks import check_folder_is_free, check_folders_are_writable, not_counted


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
        MirageError: shards, their counts, the model's folder, the run to start from, or what `evaluation` names are
            missing here.
    """
    _check_read_timeout(config)
    folders = load_folders(config.data).folders
    if config.evaluation.shards is not None:
        load_manifest(config.evaluation.shards, Reading.of(config.data))
    check_named(config.evaluation)
    if config.model.lora is not None:
        check_peft()
    for folder in folders if config.data.packing else ():
        # Of a server's, and for another tokenizer: found as soon as that can be loaded.
        if isinstance(folder.place, LocalPlace) and not any(folder.path.glob("tokens-*.npz")):
            raise not_counted(config, folder)
    check_model(config.model.path, f"model.path={config.model.path}", config.model.cache_dir)
    if config.data.num_workers:
        check_temporary_folder()
    resumes = config.run.resume != "never" and complete.tags(config.run.dir / complete.FOLDER)
    if config.run.init_from is not None and not resumes and not config.run.init_from.is_dir():
        raise DataError(
            f"the run to start from does not exist (run.init_from={config.run.init_from}); allowed: the folder of a "
            "run with a checkpoint; set run.init_from"
        )


def _check_read_timeout(config: Config) -> None:
    """Raises: ConfigError: the run would end by its own time limit before a server that stalls is named."""
    longest_s, limit_s = longest_wait_s(config.data.read_timeout_s), config.distributed.timeout_s * 4 // 5
    if longest_s < limit_s or all(isinstance(each.path, Path) for each in config.data.sets):
        return
    raise ConfigError(
        f"all tries to read from a server that stalls take {longest_s:g} s "
        f"(data.read_timeout_s={config.data.read_timeout_s}); allowed: less than {limit_s} s, four fifths of "
        "distributed.timeout_s; set a smaller data.read_timeout_s, or a larger distributed.timeout_s"
    )
