"""`mirage inspect` and the arms of an evaluation on rows of several turns."""

import json
from pathlib import Path

import pytest
from conversation_rows import ROWS, K, write_conversations
from html_page import Page
from talkative import write_talkative
from typer.testing import CliRunner

from mirage_ds.cli import app
from mirage_ds.data.rows import read_questions
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import parse_arms
from mirage_ds.evaluation.latents.replacements import Replacements
from mirage_ds.evaluation.scoring import fields_of
from mirage_ds.evaluation.settings import digest_of_rows
from mirage_ds.inference.generate import load_decoder
from mirage_ds.tokens import IMAGE_PAD


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_talkative(tmp_path_factory.mktemp("talkative")))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("asked") / "rows", ROWS[1:])


def rows_of(data: Path) -> list[Row]:
    return [Row(number, *pair) for number, pair in enumerate(read_questions(data))]


def test_the_report_shows_what_was_said_before(model: str, data: Path, tmp_path: Path) -> None:
    arguments = ["inspect", "--model", model, "--data", data, "--output", tmp_path / "page.html", "--latent-size", K]
    done = CliRunner().invoke(app, [*map(str, arguments), "--max-new-tokens", "8"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = Page((tmp_path / "page.html").read_text())
    assert "[human] Look. [gpt] I see <image> here. [human] Where?" in " ".join(page.text.split())
    assert "[gpt] I guess. [human] Again?" in " ".join(page.text.split())


def test_arms_replace_the_images_of_all_turns(model: str, data: Path) -> None:
    decoder, encoder = load_decoder(model, latent_size=K)
    rows = rows_of(data)
    replacements = Replacements(decoder, encoder, rows, seed=0)
    pad = encoder.ids.image_pad
    tokens = {}
    for arm in parse_arms("own", "all"):
        prompts = [replacements.prompt(arm, row) for row in rows]
        tokens[arm.image] = [int((prompt.input_ids == pad).sum()) for prompt in prompts]
        if arm.image == "none":
            text = encoder.tokenizer.decode(prompts[0].input_ids)
            assert "user\nLook.<|im_end|>\n<|im_start|>assistant\nI see  here.<|im_end|>" in text
            assert IMAGE_PAD not in text
    assert tokens == {"own": [8, 10], "gray": [8, 10], "other": [4, 16], "none": [0, 0]}


def test_tasks_and_the_digest_of_rows_have_the_context(data: Path, tmp_path: Path) -> None:
    rows = rows_of(data)
    fields = fields_of(rows[0].sample)
    assert fields["conversations"] == ROWS[1]["conversations"]
    assert (fields["text_input"], fields["text_output"]) == ("Where?", "There. <output_image> Yes.")
    changed = json.loads(json.dumps(ROWS[1:]).replace("I guess.", "I know."))
    others = rows_of(write_conversations(tmp_path / "rows", changed))
    assert digest_of_rows(rows) != digest_of_rows(others)
    assert digest_of_rows(rows[:1]) == digest_of_rows(others[:1])
