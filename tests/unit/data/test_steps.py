"""Steps: each global batch of the plan, cut for any number of ranks; and what its samples are said to cost."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mirage_ds.data.costs import CHARS_PER_TOKEN, TOKEN_PATCHES, Costs, measure_costs
from mirage_ds.data.encode import Encoder
from mirage_ds.data.index import load_index
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.plan import Plan
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.steps import Share, Steps
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import ConfigError

LENGTHS = np.array([5, 60, 7, 31, 8, 90, 12, 44, 3, 28, 71], dtype=np.int64)
HOW = {
    "in order": {"balance": False},
    "balanced": {"balance": True},
    "packed": {"token_budget": 100},
}


def steps_of(share: Share, how: str) -> Steps:
    """Of eleven samples; global batches cross epochs."""
    return Steps(Plan(len(LENGTHS), "d", 3), Costs(LENGTHS, LENGTHS), share, **HOW[how])


@pytest.mark.parametrize("how", HOW)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_the_ranks_share_each_global_batch(
    how: str, world_size: int, micro_batch: int, accumulation: int, number: int
) -> None:
    """Every position once; as many micro-steps on every rank; the same figure of imbalance, which none is told."""
    size = world_size * micro_batch * accumulation
    ranks = [
        steps_of(Share(rank, world_size, micro_batch, accumulation), how).at(number * size)
        for rank in range(world_size)
    ]
    found = [position for step in ranks for positions in step.micro_batches for position in positions]
    assert sorted(found) == list(range(number * size, (number + 1) * size))
    assert len({len(step.micro_batches) for step in ranks}) == 1
    assert len({step.imbalance for step in ranks}) == 1
    assert all(positions for step in ranks for positions in step.micro_batches)


@pytest.mark.parametrize("how", HOW)
def test_a_later_start_continues_the_same_steps(how: str) -> None:
    """The stream has the micro-batches that the trainer asks for step by step."""
    from_start = steps_of(Share(1, 2, 2, 3), how)
    expected = [from_start.at(start).micro_batches for start in range(0, 60, 12)]
    following = [positions for step in expected for positions in step]
    assert list(islice(from_start.micro_batches(), len(following))) == following
    resumed = steps_of(Share(1, 2, 2, 3, start=36), how)
    assert list(islice(resumed.micro_batches(), len(expected[3]))) == expected[3]


def test_in_order_is_in_order() -> None:
    ranks = [steps_of(Share(rank, 2, 2, 2), "in order").at(8).micro_batches for rank in (0, 1)]
    assert ranks == [[[8, 9], [12, 13]], [[10, 11], [14, 15]]]


def test_a_start_inside_a_global_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the data position is 6 samples .* a global batch has 4"):
        Share(0, 2, 1, 2, start=6)


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_costs_are_those_of_the_encoded_samples(
    shards: ShardFolder, tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor, stage: str
) -> None:
    """With counted texts, tokens and patches are exact; from characters, the pads still are."""
    encoder, read = Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=2), SampleReader(shards)
    samples = [encoder(read(number)) for number in range(shards.num_samples)]
    tokens = [len(sample.input_ids) for sample in samples]
    pads = [int((sample.image_mask | sample.latent_mask).sum()) for sample in samples]
    inputs, helpers = ([len(getattr(each, f"pixel_values{kind}")) for each in samples] for kind in ("", "_latent"))
    texts = np.array(tokens, dtype=np.int32) - np.array(pads, dtype=np.int32)
    index, facts = load_index(shards), {"stage": stage, "latent_size": 2}

    exact = measure_costs(index, encoder.image_tokens, texts=texts, **facts)
    assert exact.tokens.tolist() == tokens
    assert exact.costs.tolist() == (TOKEN_PATCHES * exact.tokens + np.array(inputs) + np.array(helpers)).tolist()
    kept = measure_costs(index, encoder.image_tokens, texts=texts, keeps_targets=True, **facts)
    assert kept.costs.tolist() == (TOKEN_PATCHES * exact.tokens + np.array(inputs)).tolist()
    longer = [replace(entry, answer_chars=entry.answer_chars + 30) for entry in index]
    estimated, more = (measure_costs(entries, encoder.image_tokens, **facts).tokens for entries in (index, longer))
    assert (more - estimated).tolist() == [30 // CHARS_PER_TOKEN] * len(index)
    assert (estimated > np.array(pads)).all()
