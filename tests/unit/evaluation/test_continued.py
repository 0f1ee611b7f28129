"""`mirage evaluate` killed and started again: what it continues, and what it refuses to mix."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from generated_rows import write_rows
from talkative import write_questions, write_talkative
from test_evaluate import decode

from mirage_ds.batch import Batch
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation import settings
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.options import Decoding


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_talkative(tmp_path_factory.mktemp("talkative")))


def test_an_interrupted_evaluation_continues(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finished answers stay in FILE.parts, the next start decodes the others, and the file is as without.

    The task decides no answer, so the first start may have had another one.
    """
    data, output = write_questions(tmp_path / "data", 12), tmp_path / "results"
    decode(model, data, tmp_path / "whole")
    generate = Decoder.generate
    monkeypatch.setattr(Decoder, "generate", interrupted_at_call(2, generate))
    with pytest.raises(RuntimeError, match="interrupted"):
        decode(model, data, output, "--task", "none")
    assert not output.exists()
    calls: list[Batch] = []
    monkeypatch.setattr(Decoder, "generate", lambda decoder, batch: calls.append(batch) or generate(decoder, batch))
    assert "continues: 5 of 12 answers are there" in decode(model, data, output)
    assert [len(batch.keys) for batch in calls] == [5, 2]
    assert output.read_bytes() == (tmp_path / "whole").read_bytes()


def interrupted_at_call(number: int, function: Callable) -> Callable:
    calls = []

    def wrapped(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == number:
            raise RuntimeError("interrupted")
        return function(*arguments)

    return wrapped


def test_a_function_that_fails_on_an_answer_costs_no_answers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start with the corrected file scores them, and decodes nothing."""
    data, output, task = write_questions(tmp_path / "data", 4), tmp_path / "results", tmp_path / "task.py"
    options = ("--task", f"{task}:score")
    task.write_text("def score(row, answer):\n    return 1 / (row['id'] - 2) if answer else 0\n")
    words = (
        rf"{data}:3: .*ZeroDivisionError: .*, line 2 of task.py .*; fix the function; then start again: "
        rf"all answers are kept \({output}.parts\), and none is decoded again"
    )
    with pytest.raises(ConfigError, match=words):
        decode(model, data, output, *options)
    assert not output.exists()
    task.write_text("def score(row, answer):\n    return len(answer)\n")
    monkeypatch.setattr(Decoder, "generate", lambda *_: pytest.fail("it decodes again"))
    printed = decode(model, data, output, *options)
    assert "continues: 4 of 4 answers are there" in printed
    assert " \u2501" not in printed  # a bar without work would stay empty
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["scores"]["score"]["success"] for answer in answers] == [len(answer["text"]) for answer in answers]
    assert {answer["number"] for answer in answers} == set(range(4))
    settings = json.loads(Path(f"{output}.summary.json").read_text())["settings"]
    assert settings["task_file"] == hashlib.sha256(task.read_bytes()).hexdigest()


def grown(path: Path) -> None:
    """Another content for a file."""
    path.write_bytes(path.read_bytes() + b"\n")


CHANGES: dict[str, Callable[[Path], None]] = {
    "config.json": lambda folder: grown(folder / "model" / "config.json"),
    "model.safetensors": lambda folder: os.utime(folder / "model" / "model.safetensors"),
    "rows": lambda folder: grown(folder / "rows" / "images" / "3_0.png"),
    "helper_images": lambda folder: grown(folder / "rows" / "images" / "3_1.png"),
    "transformers": lambda folder: None,
}


@pytest.fixture
def oracle(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs an evaluation of the files in a folder; killed at its second batch until it gets `True`."""
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "task.py").write_text("def score(row, answer):\n    return len(answer)\n")
    data, generate = write_rows(tmp_path / "rows", 4), Decoder.generate

    def evaluate(*, finishes: bool, latents: str = "oracle", output: str = "results") -> str:
        monkeypatch.setattr(Decoder, "generate", generate if finishes else interrupted_at_call(2, generate))
        task = ("--task", f"{tmp_path / 'task.py'}:score", "--latents", latents, "--batch-size", 3)
        return decode(str(tmp_path / "model"), data, tmp_path / output, *task)

    return evaluate


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_is_named_and_not_mixed(
    oracle: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(RuntimeError, match="interrupted"):
        oracle(finishes=False)
    CHANGES[name](tmp_path)
    if name == "transformers":
        monkeypatch.setattr(settings, "version", lambda package: "9.9" if package == name else version(package))
    with pytest.raises(DataError, match=f"an unfinished evaluation has {name}=.*, this one {name}="):
        oracle(finishes=True)
    assert not (tmp_path / "results").exists()


def test_helper_images_may_change_until_an_arm_has_read_them(oracle: Callable[..., str], tmp_path: Path) -> None:
    for latents in ("own", "own,mean", "own,mean,oracle"):
        with pytest.raises(RuntimeError, match="interrupted"):
            oracle(finishes=False, latents=latents)
        CHANGES["helper_images"](tmp_path)
    with pytest.raises(DataError, match="has helper_images="):
        oracle(finishes=True, latents="own,mean,oracle")


def test_an_arm_that_is_there_must_be_asked_for_again(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers would be deleted at the end. Others may be added, and one that was not reached is not missed."""
    data, output, generate = write_questions(tmp_path / "data", 4), tmp_path / "results", Decoder.generate
    options = ("--image", "gray,none", "--latents")
    monkeypatch.setattr(Decoder, "generate", interrupted_at_call(4, generate))  # in the last arm, which needs states
    with pytest.raises(RuntimeError, match="interrupted"):
        decode(model, data, output, *options, "mean")
    monkeypatch.setattr(Decoder, "generate", lambda *_: pytest.fail("it decodes"))
    words = (
        rf"arms that this one leaves out: image:gray, image:none \({output}.parts, .*; add them, or delete the folder"
    )
    with monkeypatch.context() as patch:
        patch.setattr(Decoding, "load", lambda *_, **__: pytest.fail("it loads the model"))
        with pytest.raises(DataError, match=words):
            decode(model, data, output, "--latents", "mean,zeroed")
    monkeypatch.setattr(Decoder, "generate", generate)
    assert "continues: 12 of 16 answers are there" in decode(model, data, output, *options, "zeroed")


def test_results_beside_the_model(oracle: Callable[..., str], tmp_path: Path) -> None:
    """What no model is read from may come and go in its folder."""
    oracle(finishes=True, output="model/first.json")
    with pytest.raises(RuntimeError, match="interrupted"):
        oracle(finishes=False, output="model/second.json")
    for path in (tmp_path / "model").glob("first.json*"):
        path.unlink()
    assert "continues: 3 of 8 answers" in oracle(finishes=True, output="model/second.json")
