"""`mirage generate` and `mirage evaluate` as typed: results, table, what they refuse."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from generated_rows import write_jsonl
from talkative import write_questions, write_talkative
from typer.testing import CliRunner

from mirage_ds.cli import app, main
from mirage_ds.errors import DataError, MirageError, OwnerError
from mirage_ds.evaluation import command
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.evaluation.results import Results

PLANNING, REASONING = "vsp-spatial-planning", "vsp-spatial-reasoning"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_talkative(tmp_path_factory.mktemp("talkative")))


def run(*arguments: object) -> str:
    """What the command prints; an error is raised as it is."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def decode(model: str, data: Path, output: Path, *more: object) -> str:
    common = ("--task", PLANNING, "--latent-size", 3, "--max-new-tokens", 12, "--batch-size", 5)
    return run("evaluate", "--model", model, "--data", data, "--output", output, *common, *more)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results(model: str, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 12)
    printed = decode(model, data, tmp_path / "new" / "results.jsonl")
    records = lines(tmp_path / "new" / "results.jsonl")
    assert [record["where"] for record in records] == [f"{data}:{number + 1}" for number in range(12)]
    assert [record["row"]["id"] for record in records] == list(range(12))
    assert all(set(record["scores"]) == {"strict", "reference"} for record in records)
    assert any(record["num_latents"] for record in records)
    summary = json.loads((tmp_path / "new" / "results.jsonl.summary.json").read_text())
    assert summary["arms"]["own"]["rates"]["strict"]["num_rows"] == 12
    assert summary["settings"]["temperature"] == 0
    assert summary["settings"]["latent_size"] == 3
    assert summary["settings"]["computed"] == "float32 on cpu, attention sdpa (flash-attn needs a GPU)"
    cut_off = [record for record in records if not record["complete"]]
    assert all(record["num_tokens"] == 12 for record in cut_off)
    assert cut_off
    assert re.search(rf"\bown .* {len(cut_off) / 12:.1%} │ ", printed)
    assert {"torch", "transformers", "git_commit"} <= set(summary["versions"])
    for words in (PLANNING, "strict", "reference", "95% interval", "all rows: 12"):
        assert words in printed
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"results.jsonl", "results.jsonl.summary.json"}


def test_sampled_and_zeroed(model: str, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 9)
    sampled = ("--temperature", 0.7, "--top-p", 0.9)
    ways = {
        "greedy": (),
        "one": (*sampled, "--seed", 1),
        "again": (*sampled, "--seed", 1),
        "two": (*sampled, "--seed", 2),
    }
    ways["zeroed"] = ("--latents", "zeroed")
    texts = {}
    for name, options in ways.items():
        decode(model, data, tmp_path / name, *options)
        arm = "zeroed" if name == "zeroed" else "own"
        texts[name] = [record["text"] for record in lines(tmp_path / name) if record["arm"] == arm]
    assert texts["one"] == texts["again"]
    assert len({tuple(texts[name]) for name in ("greedy", "one", "two", "zeroed")}) == 4


@pytest.mark.skipif(
    "MIRAGE_VSP_DIR" not in os.environ,
    reason="MIRAGE_VSP_DIR does not name the reference's own rows, which have no licence to be shipped",
)
def test_the_reference_s_planning_rows(model: str, tmp_path: Path) -> None:
    """Real rows, which have no answer: one of each level, at the size that the model folder allows."""
    data = Path(os.environ["MIRAGE_VSP_DIR"]) / "test" / "test_part.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    chosen = {len(row["map_desc"]): row for row in rows}
    for row in chosen.values():
        row["image_input"] = str(data.parent / row["image_input"])
    few = write_jsonl(tmp_path / "few.jsonl", list(chosen.values()))
    printed = decode(model, few, tmp_path / "results")
    assert {len(record["row"]["map_desc"]) for record in lines(tmp_path / "results")} == {3, 4, 5, 6}
    assert "all rows: 4" in printed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"map_desc": [[1, 2]]}, r"no field text_input \(.*rows.jsonl:1\), fields: 'map_desc';"),
        ({"text_input": "?", "image_input": "no.png"}, "image_input cannot be read: 'no.png'"),
        ({"text_input": "<image>"}, "image slots in text_input: 1, input images: 0"),
    ],
)
def test_rows_that_cannot_be_asked(tmp_path: Path, row: dict, message: str) -> None:
    """Refused before anything is loaded or written."""
    data = write_jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(DataError, match=message):
        run("evaluate", "--model", "some/model", "--task", PLANNING, "--data", data, "--output", tmp_path / "results")
    assert list(tmp_path.iterdir()) == [data]


def test_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "?", "image_input": "bad.png", "map_desc": [[1, 2]]}])
    with pytest.raises(DataError, match=r"cannot be decoded.*rows.jsonl:1, image 0"):
        run("evaluate", "--model", "some/model", "--task", PLANNING, "--data", data, "--output", tmp_path / "results")


def test_existing_results_are_kept(tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 2)
    (tmp_path / "results").write_text("mine")
    with pytest.raises(DataError, match=r"the file exists already \(.*results, --output\)"):
        decode("some/model", data, tmp_path / "results")
    assert (tmp_path / "results").read_text() == "mine"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model", "none/of/these"), "folder does not exist"),
        (("--model", Path(__file__).parent), "no config.json"),
        (("--top-p", 2, "--temperature", 1), "sampling"),
    ],
)
def test_refusals_write_nothing(model: str, tmp_path: Path, more: tuple, message: str) -> None:
    data = write_questions(tmp_path / "data", 4)
    with pytest.raises(MirageError, match=message):
        decode(model, data, tmp_path / "new" / "results", *more)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_results_that_cannot_be_written(model: str, tmp_path: Path) -> None:
    data = write_questions(tmp_path / "data", 2)
    with pytest.raises(DataError, match=r"cannot be written: .*/dev/null/results.*name another --output"):
        decode(model, data, Path("/dev/null/results"))


def test_two_evaluations_do_not_share_a_file(tmp_path: Path) -> None:
    with Results(tmp_path / "results"), pytest.raises(OwnerError, match="another program writes to this output"):
        Results(tmp_path / "results").__enter__()
    assert not list(tmp_path.iterdir())


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, gather: Callable) -> None:
    monkeypatch.setattr(command, "join", lambda: Ranks(rank, size, gather))


def test_one_rank_decodes_the_images_to_check_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad.png").write_bytes(b"not an image")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "?", "image_input": "bad.png"}])
    arguments = (
        "evaluate",
        "--model",
        "some/model",
        "--task",
        "none",
        "--data",
        data,
        "--output",
        tmp_path / "results",
    )
    as_rank(monkeypatch, 1, 2, lambda value: [None, value])
    assert "checked" not in run(*arguments, "--check")  # the first rank says so
    as_rank(monkeypatch, 0, 2, lambda value: [value, None])
    with pytest.raises(DataError, match="cannot be decoded"):
        run(*arguments, "--check")


def test_what_a_check_has_found(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "?", "answer": answer} for answer in ("x", [], "y")])
    how = ("--task", "exact", "--latents", "mean,none", "--check")
    printed = run("evaluate", "--model", "some/model", "--data", data, "--output", tmp_path / "results", *how)
    assert printed == "checked rows: 3, of which 1 cannot be scored; arms: own, mean, none\n"
    assert list(tmp_path.iterdir()) == [data]


def test_ranks_wait_until_the_results_are_written(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job of SLURM may be killed some time after its first process has ended."""
    data, written = write_questions(tmp_path / "data", 4), []

    def gather(value: object) -> list[object]:
        written.append((tmp_path / "results").exists())
        return [value]

    as_rank(monkeypatch, 0, 1, gather)
    decode(model, data, tmp_path / "results")
    assert written[-1]
    assert not any(written[:-1])


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluate", "--model", "some/model", "--task", PLANNING, "--data", "none.jsonl", "--output", "none"),
        ("generate", "--model", "some/model", "--prompt", "?", "--image", "none.png"),
    ],
)
def test_a_wrong_path_is_reported_without_torch(arguments: tuple[str, ...]) -> None:
    """So the message comes at once; torch and transformers take seconds to import."""
    program = "from mirage_ds.cli import app, errors\nimport sys\n"
    program += f"sys.argv = {['mirage', *arguments]}\n"
    program += "try: app()\nexcept errors.MirageError as error: print(error, 'torch' in sys.modules)\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600)
    assert "No such file or directory" in result.stdout
    assert result.stdout.strip().endswith("False")


def test_multiple_choice(model: str, tmp_path: Path) -> None:
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"text_input": f"{letter}?", "text_output": f"\\boxed{{{letter}}}"} for letter in "AB"],
    )
    decode(model, data, tmp_path / "results", "--task", REASONING)
    found = [record["scores"]["exact"] for record in lines(tmp_path / "results")]
    assert [(each["success"], each["status"], each["expected"]) for each in found] == [
        (False, "Invalid", letter) for letter in "AB"
    ]


def test_a_constant_answer(model: str, tmp_path: Path) -> None:
    """To one question, asked twice, with two right answers."""
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "Why?", "answer": answer} for answer in ("x", "y")])
    printed = decode(model, data, tmp_path / "results", "--task", "exact")
    assert "all 2 valid answers in the arm own are " in printed
    assert "always the most frequent answer: 50.0%" in " ".join(printed.split())


def test_generate(model: str, tmp_path: Path) -> None:
    """One question with two images, and one without any."""
    write_questions(tmp_path / "data", 6)
    images = ("--image", tmp_path / "data" / "5_0.png", "--image", tmp_path / "data" / "5_1.png")
    common = ("generate", "--model", model, "--latent-size", 3, "--max-new-tokens", 12, "--prompt")
    with_images = run(*common, "<image> or <image>: reach?", *images)
    assert with_images.strip()
    assert run(*common, "reach?") != with_images
    with pytest.raises(DataError, match=r"image slots in text_input: 2, input images: 1 \(--prompt\)"):
        run(*common, "<image> or <image>", *images[:2])
    with pytest.raises(DataError, match=r"the question is empty \(--prompt\)"):
        run(*common, "")
    with pytest.raises(DataError, match=r"cannot be read: No such file or directory \(--image nothing\.png\)"):
        run(*common, "?", "--image", "nothing.png")


@pytest.mark.parametrize("command", ["generate", "evaluate", "export"])
def test_a_user_s_mistake_is_one_message_and_exit_code_2(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = str(tmp_path / "nothing")
    options = {
        "generate": ["--model", nothing, "--prompt", "?"],
        "evaluate": ["--model", nothing, "--task", PLANNING, "--data", nothing, "--output", nothing],
        "export": ["--checkpoint", nothing, "--output", nothing],
    }
    monkeypatch.setattr("sys.argv", ["mirage", command, *options[command]])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert nothing in message
    assert "Traceback" not in message
    assert not list(tmp_path.iterdir())
