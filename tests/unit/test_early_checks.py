"""What is refused before torch is loaded; tests/unit/test_mistakes_are_cheap.py has the messages of every command."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from mirage_ds.config import Config
from mirage_ds.early_checks import check_inputs, read_command_line
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.recipe import load_config
from mirage_ds.training.folder_checks import check_folder_is_free, check_folders_are_writable

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
TASK = """
from math import sqrt
LIMIT = 3
if LIMIT > 2:
    def score(row, answer): return len(answer) > LIMIT
def other(row, answer): return 1
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with shards and a model's folder."""
    shard = {"name": "a.tar", "samples": 1, "bytes": 10, "sha256": ""}
    manifest = {"format_version": 1, "num_samples": 1, "index_sha256": "", "shards": [shard]}
    (tmp_path / "shards").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "shards" / "a.tar").write_bytes(bytes(10))
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def configuration(*overrides: str) -> Config:
    return load_config(RECIPE, ["data.shards=shards", "model.path=model", "run.dir=run", *overrides])


def test_inputs_that_are_there(here: Path) -> None:
    (here / "rows.jsonl").write_text('{"text_input": "Where?"}\n')
    (here / "task.py").write_text(f"raise RuntimeError('is executed')\n{TASK}")
    (here / "bundle.py").write_text("from task import *\n")
    check_inputs(configuration("evaluation.shards=shards", "run.init_from=model"))
    check_inputs(configuration("model.path=some/model"))
    check_inputs(configuration("evaluation.task=choice", "evaluation.rows=shards", "evaluation.latents=own,noise:2"))
    for function in ("task.py:score", "task.py:other", "task.py:sqrt", "bundle.py:score"):
        check_inputs(configuration(f"evaluation.task={function}", "evaluation.rows=rows.jsonl"))


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("data.shards=none", DataError, r"no manifest\.json"),
        ("evaluation.shards=none", DataError, r"no manifest\.json"),
        ("model.path=none", ConfigError, r"folder does not exist \(model\.path=none\)"),
        ("run.init_from=none", DataError, r"the run to start from does not exist \(run\.init_from=none\)"),
        ("evaluation.task=vsp", ConfigError, r"unknown task 'vsp' \(evaluation\.task\); .* my_file\.py:function"),
        ("evaluation.task=none.py:score", ConfigError, r"no such file \(evaluation\.task=none\.py:score\)"),
        ("evaluation.task=task.py:scores", ConfigError, r"no function 'scores' \(.*\); .* are score, other; correct"),
        ("evaluation.task=broken.py:score", ConfigError, r"cannot be imported: SyntaxError: .*\(broken\.py, line 2\)"),
        ("evaluation.latents=own,meen", ConfigError, r"'meen' is unknown \(evaluation\.latents=own,meen\)"),
        ("evaluation.rows=none", DataError, r"^evaluation\.rows=none: cannot read the rows: No such file .* \(none\)"),
        ("evaluation.rows=empty.jsonl", DataError, r"^evaluation\.rows=empty\.jsonl: no rows \(empty\.jsonl\)"),
        (
            "evaluation.rows=model",
            DataError,
            r"^evaluation\.rows=model: .*no manifest\.json.* \(model/manifest\.json\)",
        ),
    ],
)
def test_inputs_that_are_missing(here: Path, override: str, error: type[Exception], words: str) -> None:
    (here / "empty.jsonl").touch()
    (here / "task.py").write_text(TASK)
    (here / "broken.py").write_text("\ndef score(row, answer:\n")
    asks = ["evaluation.task=exact", "evaluation.rows=shards"] if override.startswith("evaluation.") else []
    with pytest.raises(error, match=words):
        check_inputs(configuration(*asks, override))


def test_a_run_that_resumes_needs_its_start_no_more(here: Path) -> None:
    """The stage-1 run may be deleted once stage 2 has a checkpoint of its own."""
    (here / "run" / "checkpoints" / "global_step5").mkdir(parents=True)
    check_inputs(configuration("run.init_from=none", "run.resume=auto"))


@pytest.mark.parametrize("num_bytes", [75, 76])
def test_a_temporary_folder_whose_path_is_too_long_for_sockets(
    here: Path, monkeypatch: pytest.MonkeyPatch, num_bytes: int
) -> None:
    """The limit is that of the system, which multiprocessing meets in a data worker."""
    folder = Path("/tmp", "x" * (num_bytes - len("/tmp/")))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    fits = len(str(folder / "pymp-12345678" / "listener-12345678")) <= 107
    check_inputs(configuration("data.num_workers=0"))
    if fits:
        check_inputs(configuration("data.num_workers=1"))
    else:
        with pytest.raises(ConfigError, match=r"76 bytes \(TMPDIR=/tmp/xxx.*set TMPDIR=/tmp"):
            check_inputs(configuration("data.num_workers=1"))


def test_a_folder_with_a_checkpoint_is_taken(here: Path) -> None:
    """What a start that failed before its first checkpoint has left does not count."""
    (here / "run" / "checkpoints" / "global_step5.part").mkdir(parents=True)
    (here / "run" / "metrics.jsonl").touch()
    check_folder_is_free(configuration().run)
    (here / "run" / "checkpoints" / "global_step5").mkdir()
    with pytest.raises(ConfigError, match=r"holds another run already \(run\.dir=run\).*run\.resume=auto to resume"):
        check_folder_is_free(configuration().run)
    check_folder_is_free(configuration("run.resume=auto").run)


def test_the_command_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `mirage-launch`, torchrun and srun give it, and as DeepSpeed's launcher does."""
    arguments = [str(RECIPE), "data.shards=shards", "model.path=model", "train.lr=0.5"]
    for argv in (arguments, ["--local_rank=1", *arguments], [arguments[0], "--local_rank=1", *arguments[1:]]):
        monkeypatch.setattr(sys, "argv", ["train", *argv])
        assert read_command_line().train.lr == 0.5


def test_a_run_of_a_colleague_and_a_link_to_nowhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "run").mkdir()
    (here / "run" / "checkpoints").symlink_to(here / "gone")
    with pytest.raises(
        DataError, match=r"No such file .* link to .*gone \(run/checkpoints\).*set run\.dir to a folder"
    ):
        check_folders_are_writable(configuration("run.resume=auto"))
    (here / "run" / "checkpoints").unlink()

    def refuse(dir: Path) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(DataError, match=r"Permission denied \(run\).*a place where you may write; set run\.dir"):
        check_folders_are_writable(configuration("run.resume=auto"))


def test_a_target_cache_that_cannot_be_made(here: Path) -> None:
    (here / "targets").touch()
    with pytest.raises(DataError, match=r"Not a directory \(targets\).*; set model\.cache_targets to a folder"):
        check_folders_are_writable(configuration("model.cache_targets=targets"))


def test_lora_needs_peft(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_inputs(configuration("model.path=some/model", "model.lora.rank=8"))
    monkeypatch.setattr("mirage_ds.config_lora.find_spec", {"peft": None}.__getitem__)
    with pytest.raises(ConfigError, match=r"peft is not installed \(model\.lora\).*or leave out model\.lora"):
        check_inputs(configuration("model.path=some/model", "model.lora.rank=8"))
    check_inputs(configuration("model.path=some/model"))
