"""Rows of several turns in `mirage-data`: looked at in the terminal and as a page, and copied."""

from pathlib import Path

import pytest
from conversation_rows import K, write_conversations
from html_page import Page

from data_tools.build import build
from data_tools.conditions import parse_condition
from data_tools.head import head
from data_tools.preview import preview
from data_tools.selection import filter_rows
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shown")
    build(write_conversations(place / "rows"), place / "shards", maxcount=2, maxsize=10**9)
    return place / "shards"


def test_head_prints_all_turns(shards: Path) -> None:
    assert list(head(shards, 2)) == [
        "000000000 (shard-000000.tar): input images 84 x 56, 56 x 56; helper images 84 x 84, 112 x 56, 84 x 56; latent "
        "blocks 3, K 2, 3, 1",
        "  system:   Be short.",
        "  question: <image> What is it?",
        "  answer:   A flag. <output_image>",
        "  question: And now? <image>",
        "  answer:   <output_image> Red, <output_image>of two.",
        "000000001 (shard-000000.tar): input images 112 x 56; helper images 84 x 84; latent blocks 1",
        "  question: Look.",
        "  answer (not trained): I see <image> here.",
        "  question: Where?",
        "  answer:   There. <output_image> Yes.",
    ]


def test_the_page_has_images_and_latents_in_their_turns(shards: Path, tmp_path: Path) -> None:
    def text_of(match: str | None) -> str:
        output = tmp_path / f"{match}.html"
        preview(shards, output, rows=3, match=match, latent_size=K, options=None)
        page = Page(output.read_text())
        assert not page.problems
        return " ".join(page.text.split())

    text = text_of(None)
    for turns in (
        "System Be short. Question image 1 What is it? Answer A flag. block 1: K = 2 Question And now? image 2 Answer "
        "block 2: K = 3 Red, block 3: K = 1of two.",
        "Question Look. Answer, not trained I see image 1 here. Question Where? Answer There. block 1: K = 4 Yes.",
        "Question image 1image 2A longer question",
        "Question Again? Answer block 1: K = 4So.",
    ):
        assert turns in text
    found = text_of("look.")  # what an earlier turn has
    assert "000000001" in found
    assert "000000000" not in found


def test_rows_are_copied_with_their_turns(shards: Path, tmp_path: Path) -> None:
    conditions = [parse_condition(text) for text in ("text_output~Yes", "latent_blocks=1")]
    filter_rows(shards, tmp_path / "some", conditions, options=None, maxcount=9, maxsize=10**9)
    some = load_manifest(tmp_path / "some")
    assert some.num_samples == 1
    assert SampleReader(some)(0).turns == SampleReader(load_manifest(shards))(1).turns
