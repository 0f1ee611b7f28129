"""Steps: each global batch of the plan, cut for any number of ranks; and what its samples are said to cost."""

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from dealt import AsTheyCome
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mirage_ds.data.columns import Index
from mirage_ds.data.costs import CHARS_PER_TOKEN, PASS_TOKENS, TOKEN_PATCHES, Costs, SampleCosts
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
    return Steps(Plan(len(LENGTHS), "d", 3), Costs(LENGTHS, TOKEN_PATCHES * LENGTHS), share, **HOW[how])


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


def test_imbalance_counts_the_padding_of_a_micro_batch() -> None:
    """By hand, in tokens and 2 patches of each sample: two rows of 9 and two of 8 are computed, not 10 and 16."""
    tokens = np.array([9, 8, 8, 1], dtype=np.int64)
    costs, share = Costs(tokens, TOKEN_PATCHES * tokens + 2), Share(0, 2, 2)
    steps = Steps(AsTheyCome(), costs, share)
    assert steps.deal(0) == [[[0, 3], [1, 2]]]
    computed = [TOKEN_PATCHES * 18 + 4, TOKEN_PATCHES * 16 + 4]
    assert steps.loads(0, steps.deal(0)).tolist() == [computed]
    assert steps.at(0).imbalance == pytest.approx(computed[0] / np.mean(computed))
    packed = Steps(AsTheyCome(), costs, share, token_budget=13)
    loads = [TOKEN_PATCHES * tokens[places].sum() + 2 * len(places) for ranks in packed.deal(0) for places in ranks]
    assert packed.loads(0, packed.deal(0)).flatten().tolist() == loads


def test_passes_count_where_a_row_makes_its_own() -> None:
    """Rows of as many tokens: the two with 20 latents are computed at a time. Rows of a micro-batch share passes."""
    tokens, passes = np.full(4, 100, dtype=np.int64), np.array([20, 1, 1, 20], dtype=np.int64)
    costs = Costs(tokens, TOKEN_PATCHES * tokens, passes)
    alone, together = Steps(AsTheyCome(), costs, Share(0, 2, 1, 2)), Steps(AsTheyCome(), costs, Share(0, 2, 2))
    assert alone.deal(0) == [[[0], [3]], [[1], [2]]]
    expected = [[TOKEN_PATCHES * (100 + PASS_TOKENS * latents)] * 2 for latents in (20, 1)]
    assert alone.loads(0, alone.deal(0)).tolist() == expected
    assert together.loads(0, together.deal(0)).tolist() == [[TOKEN_PATCHES * 200] * 2]


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
    index = load_index(shards)

    def costs(entries: Index, **more: Any) -> Costs:
        return SampleCosts(entries, encoder.image_tokens, stage, 2, **more).all()

    exact = costs(index, texts=texts)
    assert exact.tokens.tolist() == tokens
    assert exact.costs.tolist() == (TOKEN_PATCHES * exact.tokens + np.array(inputs) + np.array(helpers)).tolist()
    latents = [sum(sample.latent_sizes) if stage == "stage2" else 0 for sample in samples]
    assert exact.passes.tolist() == latents
    kept = costs(index, texts=texts, keeps_targets=True)
    assert kept.costs.tolist() == (TOKEN_PATCHES * exact.tokens + np.array(inputs)).tolist()
    longer = Index.of([replace(entry, answer_chars=entry.answer_chars + 30) for entry in index])
    estimated, more = costs(index).tokens, costs(longer).tokens
    assert (more - estimated).tolist() == [30 // CHARS_PER_TOKEN] * len(index)
    assert (estimated > np.array(pads)).all()
