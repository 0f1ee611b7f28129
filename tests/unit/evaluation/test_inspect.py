"""`mirage inspect` as typed, on a tiny random model: the page holds what `mirage evaluate` answers."""

import json
from pathlib import Path

import pytest
from generated_rows import write_jsonl, write_rows
from talkative import write_talkative
from test_report import ATTACK, Page
from typer.testing import CliRunner

from mirage_ds.batch import Batch
from mirage_ds.cli import app
from mirage_ds.errors import DataError
from mirage_ds.inference.generate import Decoder

NUM_ROWS, ARMS, IMAGE = 7, ("own", "none", "mean", "shuffled"), ("--image", "gray")
COMMON = ("--latent-size", 3, "--max-new-tokens", 12, "--batch-size", 4)


def run(*arguments: object) -> str:
    """What the command prints; an error is raised as it is."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_talkative(tmp_path_factory.mktemp("talkative")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows with input and helper images; one of the questions looks like a script."""
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows", NUM_ROWS)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["text_input"] = f"{ATTACK} <image>"
    return write_jsonl(path, rows)


@pytest.fixture(scope="module")
def report(model: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("report") / "new" / "report.html"
    run(
        "inspect",
        "--model",
        model,
        "--data",
        data,
        "--output",
        output,
        "--task",
        "vsp-spatial-reasoning",
        *IMAGE,
        *COMMON,
    )
    return output


def test_the_page_shows_the_answers_of_evaluate(report: Path, model: str, data: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    how = ("--task", "vsp-spatial-reasoning", "--latents", ",".join(ARMS), *IMAGE)
    run("evaluate", "--model", model, "--data", data, "--output", results, *how, *COMMON)
    answers = [json.loads(line) for line in results.read_text().splitlines()]
    page = Page(report.read_text())
    own = [answer for answer in answers if answer["arm"] == "own"]
    assert sum(answer["num_latents"] for answer in own) == len(page.all("span", "latent")) - 1  # one in the legend
    texts = "".join(page.text.split())
    assert all("".join(answer["text"].split()) in texts for answer in own)
    changed = {answer["number"] for answer in answers if answer["text"] != own[answer["number"]]["text"]}
    shown = [found["data-changed"] for found in page.all("details", "row")]
    assert shown == ["yes" if number in changed else "no" for number in range(NUM_ROWS)]
    assert len(changed) > 0


def test_the_page_is_complete_and_alone(report: Path) -> None:
    page = Page(report.read_text())
    assert not page.problems
    assert len(page.all("script")) == 1
    assert ATTACK in page.text
    num_latents = len(page.all("span", "latent")) - 1
    assert len(page.all("img")) == 2 * NUM_ROWS + num_latents  # input and helper images; a heat map for each latent
    for words in (
        "own is",
        "Always the most frequent answer: ",
        "Many of either in an arm",
        "image:gray own states; input images are gray",
        "Latent health",
        "latent 0.2",
        "target cosine",
        "vsp-spatial-reasoning",
    ):
        assert words in page.text
    assert [path.name for path in report.parent.iterdir()] == ["report.html"]


def test_rows_are_spread_evenly(model: str, data: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    run("inspect", "--model", model, "--data", data, "--output", output, "--rows", 2, "--limit", 6, *COMMON)
    page = Page(output.read_text())
    assert [found["id"] for found in page.all("details", "row")] == ["row-1", "row-4"]
    assert "Answers that differ from own" in page.text  # without a task
    assert "6 rows of" in page.text


def test_a_report_that_exists_is_kept(report: Path, model: str, data: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        run("inspect", "--model", model, "--data", data, "--output", report)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Batch]:
    """The batches that are decoded."""
    batches: list[Batch] = []
    generate = Decoder.generate
    monkeypatch.setattr(Decoder, "generate", lambda self, batch: batches.append(batch) or generate(self, batch))
    return batches


TOO_LARGE = ("--latent-size", 10, "--max-new-tokens", 12)  # every third helper image has 9 merged patches


def test_helper_images_that_cannot_be_pooled(model: str, data: Path, tmp_path: Path, decoded: list[Batch]) -> None:
    """They have no target, which is said once, and the page is written; images are shown all the same."""
    output = tmp_path / "report.html"
    printed = run("inspect", "--model", model, "--data", data, "--output", output, "--latents", "own", *TOO_LARGE)
    assert decoded
    assert printed.count("cannot be pooled to latent targets: 3; the first: the helper image has 9 merged") == 1
    page = Page(output.read_text())
    assert "target cosine" in page.text  # of the other rows
    assert len(page.all("img")) == 2 * NUM_ROWS + len(page.all("span", "latent")) - 1


def test_the_oracle_needs_all_targets(model: str, data: Path, tmp_path: Path, decoded: list[Batch]) -> None:
    """Refused before anything is decoded or written."""
    message = (
        rf"9 merged patches for 10 latents \({data}:1, for the arm oracle\); expected .*; use larger helper images"
    )
    options = ("--task", "none", "--latents", "own,oracle")
    with pytest.raises(DataError, match=message):
        run("evaluate", "--model", model, "--data", data, "--output", tmp_path / "results", *options, *TOO_LARGE)
    assert not decoded
    assert not list(tmp_path.iterdir())
