"""Rows of several turns in a run: what the index says of them, what a run refuses, control arms, and prompts."""

from dataclasses import replace
from pathlib import Path

import conversation_rows
import numpy as np
import pytest
from conversation_rows import ROWS, K, write_conversations
from generated_rows import write_jsonl

from data_tools.build import build
from data_tools.count import count
from mirage_ds.config import HelperImages, Stage
from mirage_ds.data.costs import SampleCosts
from mirage_ds.data.counts import counts_name, load_counts
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.images import header_size
from mirage_ds.data.index import load_index
from mirage_ds.data.lengths import too_long
from mirage_ds.data.rows import read_questions
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.data.target_cache import TargetCache
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import DataError
from mirage_ds.hf.preset import write_tiny

STAGES: tuple[Stage, ...] = ("text", "stage1", "stage2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("turns")
    rows = write_conversations(place / "rows")
    write_tiny(rows, place / "model", seed=0)
    build(rows, place / "shards", maxcount=2, maxsize=10**9)
    return place


@pytest.fixture
def folder(place: Path) -> ShardFolder:
    return load_manifest(place / "shards")


def encoder_of(place: Path, stage: Stage, **settings: bool) -> Encoder:
    return load_encoder(str(place / "model"), stage=stage, latent_size=K, **settings)


def test_the_index_counts_all_turns(folder: ShardFolder) -> None:
    first, second, third = load_index(folder)
    assert first.answer_chars == len("A flag. <output_image>") + len("<output_image> Red, <output_image>of two.")
    assert first.question_chars == len("Be short.<image> What is it?And now? <image>") + 3 * 15
    assert second.question_chars == len("Look.I see <image> here.Where?") + 2 * 15
    # Before the first latent block.
    assert [entry.image_blocks for entry in (first, second, third)] == [1, 1, 2]
    assert [entry.latent_blocks for entry in (first, second, third)] == [3, 1, 1]
    assert [entry.latent_sizes for entry in (first, second, third)] == [[2, 3, 1], None, None]


def test_every_block_has_its_slot_in_the_target_cache(folder: ShardFolder, tmp_path: Path) -> None:
    cache = TargetCache.open(tmp_path / "targets", folder, {}, latent_size=K, values=8, limit_bytes=2**20)
    assert [cache.slots(number) for number in range(len(ROWS))] == [range(0, 3), range(3, 4), range(4, 5)]


@pytest.mark.parametrize("system_turn", [True, False])
def test_counted_tokens_are_those_of_the_encoder(place: Path, folder: ShardFolder, system_turn: bool) -> None:
    limits = {"min_pixels": None, "max_pixels": None, "max_length": None, "cache_dir": None}
    count(folder.path, str(place / "model"), latent_size=K, system_turn=system_turn, **limits)
    for stage in STAGES:
        encoder, read = encoder_of(place, stage, system_turn=system_turn), SampleReader(folder)
        counts = load_counts(counts_name(encoder.tokenizer, system_turn=system_turn), folder, stage=stage)
        costs = SampleCosts(load_index(folder), encoder.image_tokens, stage, K, texts=counts)
        lengths = [len(encoder(read(number)).input_ids) for number in range(len(ROWS))]
        assert costs.of(np.arange(len(ROWS))).tokens.tolist() == lengths


def test_many_short_turns_do_not_pass_the_check_of_lengths(place: Path, tmp_path: Path) -> None:
    """Without counted tokens only samples are read that may be too long by the index: their markers count too."""
    rows = [
        {"conversations": [{"from": ("human", "gpt")[number % 2], "value": "a"} for number in range(2 * turns)]}
        for turns in range(1, 20)
    ]
    build(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "shards", maxcount=20, maxsize=10**9)
    folder, encoder = load_manifest(tmp_path / "shards"), encoder_of(place, "text")
    lengths = [len(encoder(SampleReader(folder)(number)).input_ids) for number in range(len(rows))]
    assert sorted(set(lengths)) == lengths
    for number, length in enumerate(lengths):
        encoder.max_length = length - 1
        assert too_long(encoder, folder, Helpers()).count == len(rows) - number


@pytest.mark.parametrize("setting", [{"answer_sees_image": False}, {"drops_images": True}])
def test_an_image_after_latents_is_refused_where_images_are_hidden(
    place: Path, folder: ShardFolder, setting: dict[str, bool]
) -> None:
    for stage in ("stage1", "stage2"):
        encoder, read = encoder_of(place, stage, **setting), SampleReader(folder)
        with pytest.raises(DataError, match=r"images after the first latent block: 1: shard-000000.tar/000000000; "):
            check_usable(encoder, folder)
        with pytest.raises(DataError, match=r"an image comes after the first latent block \(shard-.*/000000000\); "):
            encoder(read(0))
        assert all(encoder(read(number)).latent_sizes for number in (1, 2))
    check_usable(encoder_of(place, "text", **setting), folder)
    check_usable(encoder_of(place, "stage1", **setting), folder, Helpers("none"))
    check_usable(encoder_of(place, "stage1"), folder)


@pytest.mark.parametrize("images", ["none", "gray", "input", "shuffled"])
def test_control_arms_replace_the_images_of_all_answers(place: Path, folder: ShardFolder, images: HelperImages) -> None:
    helpers = Helpers(images)
    encoder, index = encoder_of(place, "stage1"), helpers.index(folder)
    own, read = SampleReader(folder), SampleReader(folder, helpers=helpers)
    for number, entry in enumerate(index):
        sample, before = read(number), own(number)
        assert [header_size(image) for image in sample.helper_images] == entry.helper_sizes
        if images == "none":
            expected = encoder_of(place, "text")(before)
            assert encoder(sample).input_ids.tolist() == expected.input_ids.tolist()
            assert encoder(sample).labels.tolist() == expected.labels.tolist()
        else:
            assert sample.turns == before.turns
            assert sample.helper_images != before.helper_images
            assert encoder(sample).latent_sizes == encoder(before).latent_sizes


def test_a_prompt_is_everything_before_the_last_answer(place: Path, tmp_path: Path) -> None:
    rows = [row | {"conversations": row["conversations"][:end]} for row in ROWS[1:] for end in (None, -1)]
    encoder = encoder_of(place, "stage1")
    samples = [sample for _, sample in read_questions(write_conversations(tmp_path / "rows", rows))]
    prompts = [encoder.prompt(sample) for sample in samples]
    for number, text in enumerate(conversation_rows.texts("stage1")[1:]):
        before = text.replace("[[", "").replace("]]", "").rpartition("<|im_start|>assistant")
        expected = encoder.tokenizer("".join(before[:2]), add_special_tokens=False)["input_ids"]
        assert [prompt.input_ids.tolist() for prompt in prompts[2 * number : 2 * number + 2]] == [expected] * 2
    assert [sample.text_output for sample in samples] == ["There. <output_image> Yes.", "", "So.", ""]


def test_latents_of_earlier_answers_cannot_be_asked(place: Path, folder: ShardFolder) -> None:
    message = r"an earlier answer has <output_image> \(.*rows.jsonl:1\); decoding takes .*; ask rows"
    with pytest.raises(DataError, match=message):
        list(read_questions(place / "rows" / "rows.jsonl"))
    with pytest.raises(DataError, match="an earlier answer has <output_image>"):
        encoder_of(place, "stage1").prompt(replace(SampleReader(folder)(0), key="k"))
