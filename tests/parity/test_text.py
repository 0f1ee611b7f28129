"""Strings, labels, masks and positions against the reference's: the text cases and the samples of the golden set.

Where mirage_ds differs on purpose, the expected string is derived from the reference's by a rule, and `differences`
finds from the case's data which rules apply:
- one block per slot: the reference adds a second block in front of an answer with <output_image> that does not start
  with <think>; and if <output_image> is only in the question, an answer that starts with <think> gets no block
- one prompt: in the reference's test prompt a question without <image> loses its images, and an <output_image> in the
  question stays text; ours is the same text in training and decoding
Rows whose image or latent blocks do not match their images are refused, although the strings agree.
"""

import json
import re
from typing import Any

import golden_set
import pytest
import torch
from deviations import check_equal
from generated_rows import image_bytes
from real_vocabulary import real_tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.data.conversation import prompt_text, train_text
from mirage_ds.data.encode import Encoder
from mirage_ds.data.ids import expand_pads, find_answers, supervised_labels
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.positions import mrope_positions
from mirage_ds.data.rows import Sample, check_sample
from mirage_ds.data.texts import RESERVED_TOKENS
from mirage_ds.errors import DataError
from mirage_ds.hf.preset import train_tokenizer
from mirage_ds.tokens import TokenIds

__all__ = ["real_tokenizer"]

MARKER = "<|im_start|>assistant"
IMAGE_BLOCK = "<|vision_start|><|image_pad|><|vision_end|>"
LATENT_BLOCK = "<|latent_start|><|image_pad|><|latent_end|>"
CASES: list[dict[str, Any]] = golden_set.numbers("text")["text"]
SAMPLES = range(len(golden_set.samples()))
K = 4


def reserved(case: dict[str, Any]) -> bool:
    return any(token in case["text_input"] + case["text_output"] for token in RESERVED_TOKENS)


def differences(case: dict[str, Any]) -> set[str]:
    """Which of our deliberate differences apply to this case."""
    question, answer = case["text_input"], case["text_output"]
    found = set()
    if "<output_image>" in answer and not answer.startswith("<think>"):
        found.add("second block")
    if "<output_image>" in question and "<output_image>" not in answer and answer.startswith("<think>"):
        found.add("no block")
    if ("<image>" not in question and case["n_images"]) or "<output_image>" in question:
        found.add("prompt")
    return found


def refused(case: dict[str, Any]) -> bool:
    """Whether the row's blocks do not match its images (every case has one helper image), or would be trained as text.

    The reference trains an <image> in the answer as text.
    """
    image_blocks = (case["text_input"].count("<image>") or case["n_images"]) + case["text_input"].count(
        "<output_image>"
    )
    num_latent_blocks, as_text = case["text_output"].count("<output_image>"), "<image>" in case["text_output"]
    return image_blocks != case["n_images"] or num_latent_blocks > 1 or as_text or reserved(case)


def expected_train_text(case: dict[str, Any]) -> str:
    text: str = case["train_text"]
    if "second block" in differences(case):
        assert f"{MARKER}\n{LATENT_BLOCK}" in text
        return text.replace(f"{MARKER}\n{LATENT_BLOCK}", f"{MARKER}\n", 1)
    if "no block" in differences(case):
        assert LATENT_BLOCK not in text
        return text.replace(f"{MARKER}\n", f"{MARKER}\n{LATENT_BLOCK}", 1)
    return text


def our_train_text(tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> str:
    return train_text(tokenizer, make_sample(case))


def make_sample(case: dict[str, Any]) -> Sample:
    images = tuple(image_bytes((84 + 28 * number, 56), seed=number) for number in range(case["n_images"]))
    return Sample("case", case["text_input"], case["text_output"], images, (image_bytes(),))


@pytest.fixture(scope="module")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(f"system user assistant {case['text_input']} {case['text_output']}" for case in CASES)


@pytest.fixture(params=["tiny", "real"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(f"{request.param}_tokenizer")


each_case = pytest.mark.parametrize("case", CASES, ids=[case["note"] for case in CASES])
usable_cases = [case for case in CASES if not refused(case)]
each_usable_case = pytest.mark.parametrize("case", usable_cases, ids=[case["note"] for case in usable_cases])
each_sample = pytest.mark.parametrize("index", SAMPLES)


@each_case
def test_training_text(tiny_tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> None:
    if case["error"] is None and not reserved(case):
        check_equal("training text", our_train_text(tiny_tokenizer, case), expected_train_text(case))


@each_case
def test_prompt(tiny_tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> None:
    prompt = prompt_text(tiny_tokenizer, make_sample(case))
    assert our_train_text(tiny_tokenizer, case).startswith(prompt)
    if case["error"] is None and not reserved(case):
        check_equal("prompt", prompt, expected_train_text(case).partition(MARKER)[0] + MARKER)
        assert (prompt == case["test_prompt"]) == ("prompt" not in differences(case))


@each_case
def test_rows_whose_blocks_do_not_match_are_refused(case: dict[str, Any]) -> None:
    sample = make_sample(case)
    if refused(case) or case["error"] is not None:
        with pytest.raises(DataError, match="case"):
            check_sample(sample, sample.key)
    else:
        check_sample(sample, sample.key)


@each_usable_case
def test_a_row_that_is_not_refused_has_a_block_for_each_image(
    tiny_tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]
) -> None:
    """The reference agrees, except for the blocks that `differences` finds."""
    text = our_train_text(tiny_tokenizer, case)
    assert text.count(IMAGE_BLOCK) == case["n_images"] == case["n_user_image_blocks"]
    assert text.count(LATENT_BLOCK) == 1
    assert case["n_latent_blocks"] == 1 + ("second block" in differences(case)) - ("no block" in differences(case))


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
@each_usable_case
def test_labels_and_masks(tokenizer: PreTrainedTokenizerBase, case: dict[str, Any], stage: str) -> None:
    """Against the token strings and characters of the full text with all pads."""
    processor = ImageProcessor(Qwen2VLImageProcessorPil(min_pixels=3136, max_pixels=12845056))
    encoded = Encoder(tokenizer, processor, stage=stage, latent_size=K)(make_sample(case))
    text = expected_train_text(case).replace("" if stage != "text" else LATENT_BLOCK, "")
    text = text.replace(LATENT_BLOCK, "<|latent_start|>" + "<|latent_pad|>" * K + "<|latent_end|>")
    sizes = iter((3 + number) * 2 for number in range(case["n_images"]))
    text = re.sub(re.escape("<|image_pad|>"), lambda match: match[0] * next(sizes), text)
    prompt_chars = text.index(MARKER) + len(MARKER)

    full = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    strings = tokenizer.convert_ids_to_tokens(full["input_ids"])
    unsupervised = ("<|latent_pad|>", "<|endoftext|>")
    expected = [
        -100 if start < prompt_chars or string in unsupervised else token
        for token, string, (start, _) in zip(full["input_ids"], strings, full["offset_mapping"], strict=True)
    ]
    assert encoded.input_ids.tolist() == full["input_ids"]
    assert encoded.labels.tolist() == expected
    assert encoded.latent_mask.tolist() == [string == "<|latent_pad|>" for string in strings]
    assert encoded.image_mask.tolist() == [string == "<|image_pad|>" for string in strings]
    assert encoded.prompt_length == sum(start < prompt_chars for start, _ in full["offset_mapping"])


def conversations() -> list[list[dict[str, Any]]]:
    image, video = {"type": "image"}, {"type": "video"}
    mixed = [image, {"type": "text", "text": "a"}, video, {"image": "x.png"}, {"type": "text", "text": "b"}]
    system = {"role": "system", "content": "S"}
    user, answer = {"role": "user", "content": mixed}, {"role": "assistant", "content": "A"}
    return [[user], [user, answer], [system, user, answer, user], [{"role": "user", "content": "only text\n"}]]


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": True}, {"add_vision_id": True}])
@pytest.mark.parametrize("messages", conversations(), ids=lambda messages: json.dumps(messages)[:40])
def test_our_chat_template_renders_as_the_public_one(
    tiny_tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], options: dict[str, bool]
) -> None:
    public = golden_set.numbers("text")["chat_template"]
    ours = tiny_tokenizer.apply_chat_template(messages, tokenize=False, **options)
    assert ours == tiny_tokenizer.apply_chat_template(messages, tokenize=False, chat_template=public, **options)


@each_case
def test_our_chat_template_renders_the_cases(tiny_tokenizer: PreTrainedTokenizerBase, case: dict[str, Any]) -> None:
    image = {"type": "image"}
    question, answer = ({"type": "text", "text": case[name]} for name in ("text_input", "text_output"))
    messages = [
        {"role": "user", "content": [image] * case["n_images"] + [question]},
        {"role": "assistant", "content": [image, answer]},
    ]
    check_equal("chat template", tiny_tokenizer.apply_chat_template(messages, tokenize=False), case["template"])


def golden_ids() -> TokenIds:
    ids = golden_set.numbers("golden")["ids"]
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    latents = ("latent_pad", "latent_start", "latent_end")
    return TokenIds(end_of_text=ids["pad"], **{name: ids[name] for name in (*names, *latents)})


def merge_size() -> int:
    config = json.loads((golden_set.FOLDER / "model" / "config.json").read_text())
    size: int = config["vision_config"]["spatial_merge_size"]
    return size


@each_sample
def test_golden_labels_and_mask(index: int) -> None:
    sample, ids = golden_set.encoded(index, "stage1"), golden_set.numbers("golden")["ids"]
    marker = torch.tensor([ids["im_start"], ids["assistant"]])
    answers = find_answers(sample.input_ids, marker)
    assert answers == [range(sample.prompt_length, len(sample.input_ids))]
    check_equal("labels", supervised_labels(sample.input_ids, answers, golden_ids()), sample.labels)
    check_equal("latent masks", sample.input_ids == golden_ids().latent_pad, sample.latent_mask)


@each_sample
def test_golden_positions(index: int) -> None:
    sample = golden_set.encoded(index, "stage1")
    positions = mrope_positions(sample.image_mask, sample.image_grid_thw, merge_size())
    check_equal("positions", positions, sample.position_ids)


@each_sample
def test_golden_pads(index: int) -> None:
    """From one pad per block, as in our texts, to the ids that the reference's collation made."""
    sample, ids = golden_set.encoded(index, "stage1"), golden_ids()
    raw = golden_set.tensors("inputs")[f"{index}.raw_input_ids"][0].long()
    repeated = (raw == ids.image_pad) & (raw.roll(1) == ids.image_pad)
    num_merged = (sample.image_grid_thw.prod(dim=1) // merge_size() ** 2).tolist()
    ours = expand_pads(raw[~repeated], num_merged, sample.latent_sizes, ids)
    check_equal("ids with images and latents", ours, sample.input_ids)
