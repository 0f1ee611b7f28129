"""Batches and their deal: nothing is lost, whatever the number of ranks, and no rank has much more than another."""

import random
from itertools import pairwise
from pathlib import Path

import pytest
from talkative import write_questions, write_talkative

from mirage_ds.data.encode import load_encoder
from mirage_ds.data.rows import Sample
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.batches import cut, deal, question_tokens
from mirage_ds.evaluation.questions import read_questions_of


def test_batches_have_rows_of_one_length() -> None:
    """Each row once; no row is longer than one of a batch before; equal rows in the order of the file."""
    draw = random.Random(0)
    rows = [Row(number, "", Sample("", "", "")) for number in range(50)]
    lengths = [draw.randint(1, 9) for _ in rows]
    batches = cut(rows, lengths, 8)
    assert [len(batch) for batch in batches] == [8] * 6 + [2]
    numbers = [row.number for batch in batches for row in batch]
    assert numbers == sorted(numbers, key=lambda number: (-lengths[number], number))
    assert sorted(numbers) == list(range(50))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, 40])
def test_units_are_dealt_evenly(num_ranks: int) -> None:
    draw = random.Random(num_ranks)
    costs = [draw.randint(1, 1000) for _ in range(30)]
    dealt = deal(costs, num_ranks)
    assert sorted(number for part in dealt for number in part) == list(range(30))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    if num_ranks <= 8:
        totals = [sum(costs[number] for number in part) for part in dealt]
        assert max(totals) - min(totals) <= max(costs)
    assert all(costs[first] >= costs[second] for part in dealt for first, second in pairwise(part))


def test_the_length_of_a_question(tmp_path: Path) -> None:
    """Without decoding: image tokens as the encoder makes them, text to within the assumption of the deal."""
    model = str(write_talkative(tmp_path / "talkative"))
    encoder = load_encoder(model, stage="stage2", latent_size=3)
    rows = read_questions_of(write_questions(tmp_path / "rows", 12))
    for row in rows:
        prompt = encoder.prompt(row.sample)
        images = int(prompt.image_mask.sum())
        alone = question_tokens(Sample("", row.sample.text_input, ""), encoder.image_tokens)
        found = question_tokens(row.sample, encoder.image_tokens)
        assert found - alone == images + 2 * len(row.sample.input_images)
