"""Rows of several turns against token sequences that are written by hand, and their losses against the plain loop.

Ids, labels, masks and positions are equal; losses agree to 1e-5, gradients to 1e-4 of each one's norm.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import conversation_rows
import plain_loop
import pytest
import torch
from conversation_rows import ROWS, SYSTEM, K
from micro_batch import check_against
from transformers import PreTrainedTokenizerBase, Qwen2_5_VLForConditionalGeneration

from mirage_ds.config import Stage
from mirage_ds.data.collate import collate
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.data.encode import EncodedSample, Encoder, load_encoder
from mirage_ds.data.packing import collate_packed
from mirage_ds.data.rows import Sample, read_rows
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel

STAGES: tuple[Stage, ...] = ("text", "stage1", "stage2")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("conversations")
    write_tiny(conversation_rows.write_conversations(place / "rows"), place / "model", seed=0)
    return place


@pytest.fixture(scope="module")
def samples(place: Path) -> list[Sample]:
    return [sample for _, sample in read_rows(place / "rows" / "rows.jsonl")]


def encoder_of(place: Path, stage: Stage, **settings: Any) -> Encoder:
    return load_encoder(str(place / "model"), stage=stage, latent_size=K, **settings)


def by_hand(tokenizer: PreTrainedTokenizerBase, marked: str, sample: EncodedSample) -> dict[str, Any]:
    """The plain loop's sample of a text; of `sample` it has the pixels alone."""
    spans, text = [], ""
    for number, part in enumerate(marked.replace("]]", "[[").split("[[")):
        spans += [(len(text), len(text) + len(part))] * (number % 2)
        text += part
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    input_ids = torch.tensor(encoded["input_ids"])
    trained = [any(low <= first and last <= high for low, high in spans) for first, last in encoded["offset_mapping"]]
    image_pad, latent_pad = tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|latent_pad|>"])
    latent_mask = input_ids == latent_pad
    pixels = ("pixel_values", "image_grid_thw", "pixel_values_latent", "image_grid_thw_latent", "pixel_levels")
    return {
        "input_ids": input_ids,
        "labels": torch.where(torch.tensor(trained) & ~latent_mask, input_ids, -100),
        "latent_mask": latent_mask,
        "image_mask": input_ids == image_pad,
        "latent_sizes": [part.count("<|latent_pad|>") for part in text.split("<|latent_start|>")[1:]],
        **{name: getattr(sample, name) for name in pixels},
    }


@pytest.mark.parametrize("stage", STAGES)
def test_a_row_becomes_the_tokens_that_are_written_by_hand(place: Path, samples: list[Sample], stage: Stage) -> None:
    encoder, tokenizer = encoder_of(place, stage), load_tokenizer(str(place / "model"))
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(place / "model")
    for sample, text in zip(samples, conversation_rows.texts(stage), strict=True):
        encoded = encoder(sample)
        expected = by_hand(tokenizer, text, encoded)
        for name in ("input_ids", "labels", "latent_mask", "image_mask"):
            assert getattr(encoded, name).tolist() == expected[name].tolist(), name
        assert encoded.latent_sizes == expected["latent_sizes"]
        assert encoded.prompt_length == int((encoded.labels != -100).nonzero()[0])
        assert torch.equal(encoded.position_ids, plain_loop.positions(model, expected)[:, 0])
        names = ROWS[samples.index(sample)]["image_input"]
        sizes = [conversation_rows.SIZES[name] for name in ([names] if isinstance(names, str) else names)]
        assert encoder.count_tokens(sample, sizes) == len(encoded.input_ids)


def test_data_system_turn_decides_the_default_one_alone(place: Path, samples: list[Sample]) -> None:
    with_turn, without = (encoder_of(place, "stage1", system_turn=turn) for turn in (True, False))
    removed = len(with_turn.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"])
    for sample, has_own in zip(samples, [True, False, False], strict=True):
        expected = with_turn(sample).input_ids[0 if has_own else removed :]
        assert torch.equal(without(sample).input_ids, expected)


@pytest.mark.parametrize("stage", STAGES)
def test_one_turn_in_either_form_is_encoded_equally(place: Path, tmp_path: Path, stage: Stage) -> None:
    question, answer = "<image> Is <image> it?", "A <output_image> flag."
    images = {"image_input": ["six.png", "four.png"], "image_output": "nine.png", "id": 7}
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    rows = [{"text_input": question, "text_output": answer, **images}, {"conversations": turns, **images}]
    path = conversation_rows.write_conversations(tmp_path / "rows", rows)
    first, second = (replace(sample, key="") for _, sample in read_rows(path))
    assert first == second
    encoder = encoder_of(place, stage)
    assert torch.equal(encoder(first).labels, encoder(second).labels)


@pytest.mark.parametrize("way", [*STAGES, "stage2, one by one", "stage1, packed"])
def test_losses_and_gradients_are_those_of_the_plain_loop(place: Path, samples: list[Sample], way: str) -> None:
    """Rows of a micro-batch of stage 2 are padded between their turns, before images too."""
    stage: Any = way.split(",")[0]
    encoder, tokenizer = encoder_of(place, stage), load_tokenizer(str(place / "model"))
    encoded = [encoder(sample) for sample in samples]
    expected = [by_hand(tokenizer, *pair) for pair in zip(conversation_rows.texts(stage), encoded, strict=True)]
    backbone = load_backbone(str(place / "model"), dtype=torch.float32)
    model = MirageModel(backbone, stage=stage, ce_loss_weight=0.1 if stage == "stage1" else 1.0)
    object.__setattr__(model, "hf", backbone.hf)
    if way.endswith("packed"):
        batches = [collate_packed(encoded)]
    else:
        parts = [[each] for each in encoded] if "," in way else [encoded]
        batches = [collate(part, align_latents=stage == "stage2") for part in parts]
    if way == "stage2":
        assert batches[0].left_padded
        assert model.rollout.num_passes(batches[0]) == 1 + K + 3 + 1
    check_against(model, batches, plain_loop.summed(str(place / "model"), expected, stage))
