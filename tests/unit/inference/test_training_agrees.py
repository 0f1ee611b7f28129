"""Decoding agrees with training: an answer's log-probabilities are minus the losses of stage 2 on exactly its ids.

Answers of any number of blocks, of K states or of as many as the model chose; with images that are seen after the
first block, or hidden there.
"""

from collections import Counter
from dataclasses import dataclass, replace
from itertools import groupby

import pytest
import torch
from scripted import Watched, cross_entropy
from talkative import write_questions, write_talkative

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.ids import supervised_labels
from mirage_ds.data.rows import read_questions
from mirage_ds.inference.generate import Generation, load_decoder
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.tokens import TokenIds

NUM_ROWS, LATENT_SIZE, MAX_NEW_TOKENS = 14, 4, 24
HEAD_SCALES = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}


@dataclass(frozen=True)
class Answered:
    """Rows that were decoded in one batch, and the same rows as samples for training."""

    answers: list[Generation]
    samples: list[EncodedSample]
    log_probs: list[float]  # of each row's supervised tokens, in all
    model: MirageModel


@pytest.fixture(scope="module", params=["fixed", "model", "hidden"])
def answered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answered:
    folder = tmp_path_factory.mktemp("answered")
    name = str(write_talkative(folder / "talkative", HEAD_SCALES, closes_blocks=request.param == "model"))
    decoder, encoder = load_decoder(
        name,
        latent_size=LATENT_SIZE,
        latent_end="model" if request.param == "model" else "fixed",
        max_new_tokens=MAX_NEW_TOKENS,
        sampling=(watched := Watched()),
        dtype=torch.float32,
    )
    prompts = [encoder.prompt(sample) for _, sample in read_questions(write_questions(folder / "rows", NUM_ROWS))]
    decoder.answer_sees_image = request.param != "hidden"
    answers = decoder.generate(collate(prompts, align_latents=True))
    samples = [with_answer(*row, encoder.ids) for row in zip(prompts, answers, strict=True)]
    if request.param == "hidden":
        samples = [replace(sample, hides_images=True) for sample in samples]
    labels = [sample.labels[sample.prompt_length :].tolist() for sample in samples]
    return Answered(
        answers=answers,
        samples=samples,
        log_probs=[watched.of(row, each) for row, each in enumerate(labels)],
        model=MirageModel(load_backbone(name, dtype=torch.float32), stage="stage2", ce_loss_weight=1.0),
    )


def with_answer(prompt: EncodedSample, answer: Generation, ids: TokenIds) -> EncodedSample:
    """The prompt and what was decoded from it, as a sample of training."""
    emitted = torch.tensor(answer.ids)
    input_ids = torch.cat([prompt.input_ids, emitted])
    positions = (prompt.position_ids.max() + 1 + torch.arange(len(emitted))).expand(3, -1)
    is_pad = [token == ids.latent_pad for token in answer.ids]
    return replace(
        prompt,
        input_ids=input_ids,
        labels=supervised_labels(input_ids, [range(prompt.prompt_length, len(input_ids))], ids),
        position_ids=torch.cat([prompt.position_ids, positions], dim=1),
        image_mask=torch.cat([prompt.image_mask, torch.zeros_like(emitted, dtype=torch.bool)]),
        latent_mask=input_ids == ids.latent_pad,
        latent_sizes=[len(list(run)) for pad, run in groupby(is_pad) if pad],
    )


def test_answers_are_of_all_kinds(answered: Answered) -> None:
    """Otherwise the next tests would say little: rows without a block, with several, and blocks of different K."""
    sizes = [sample.latent_sizes for sample in answered.samples]
    assert [] in sizes
    assert Counter(len(each) >= 2 for each in sizes)[True] >= 2
    assert len({len(each) for each in sizes}) >= 3
    full = {size for each in sizes for size in each[:-1]}  # the last one may be cut off
    assert full == {LATENT_SIZE} or len(full) >= 2


def test_log_probabilities_are_the_losses_of_training(answered: Answered) -> None:
    """Where images were hidden, those of training that sees them are others."""
    hidden_blocks = []
    for sample, log_probs in zip(answered.samples, answered.log_probs, strict=True):
        assert cross_entropy(answered.model, sample) == pytest.approx(-log_probs, rel=1e-5), sample.latent_sizes
        if sample.hides_images and sample.latent_sizes and sample.image_mask.any():
            seen = cross_entropy(answered.model, replace(sample, hides_images=False))
            assert seen != pytest.approx(-log_probs, rel=1e-4)
            hidden_blocks.append(len(sample.latent_sizes))
    assert not hidden_blocks or (len(hidden_blocks) >= 3 and max(hidden_blocks) >= 2)
    assert bool(hidden_blocks) == any(sample.hides_images for sample in answered.samples)


def test_a_micro_batch_of_all_answers(answered: Answered) -> None:
    """With blocks of the same ordinal in one column: the sum of the rows' means."""
    with torch.no_grad():
        losses = answered.model(collate(answered.samples, align_latents=True))
    counts = [int((sample.labels[1:] != -100).sum()) for sample in answered.samples]
    means = [-total / count for total, count in zip(answered.log_probs, counts, strict=True)]
    assert losses.ce_loss.item() == pytest.approx(sum(means), rel=1e-5)


def test_training_feeds_the_states_that_decoding_fed(answered: Answered) -> None:
    hidden: list[torch.Tensor] = []
    hook = answered.model.rollout.register_forward_hook(lambda module, inputs, output: hidden.append(output[0]))
    batch = collate(answered.samples, align_latents=True)
    with torch.no_grad():
        answered.model(batch)
    hook.remove()
    # A state after which the limit of tokens came was emitted, but never fed; training feeds it to no later token.
    fed = torch.stack([state for answer in answered.answers for state in answer.latents])
    torch.testing.assert_close(hidden[0].flatten(0, 1)[batch.latent_rows - 1], fed, rtol=1e-4, atol=1e-5)
