"""Encoding one sample: ids, labels, masks, positions, against the tokenizer on the full text, and transformers."""

import copy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

from data_tools.build import build
from mirage_ds.config import Stage
from mirage_ds.data import encode_text
from mirage_ds.data.conversation import load_tokenizer, prompt_text, train_text
from mirage_ds.data.encode import EncodedSample, Encoder, load_encoder
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.positions import mrope_positions
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.tokens import ASSISTANT_MARKER, IGNORE_INDEX, IMAGE_PAD, LATENT_PAD

QUESTION = "Here is the map: <image>\n\nand <image>.  Plan?"
ANSWER = "<think> caf\u00e9 \u5730\u56fe </think><output_image>so \\boxed{UP, LEFT}\n"
K = 3


@pytest.fixture(params=["tiny", "real"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def make_sample(question: str = QUESTION, answer: str = ANSWER, num_inputs: int = 2, num_helpers: int = 1) -> Sample:
    inputs = [image_bytes((84, 56), seed=1), image_bytes((140, 112), seed=2)]  # 6 and 20 merged tokens
    helpers = [image_bytes((56, 84), seed=3)] * num_helpers  # 6 merged patches
    return Sample("shard/k", question, answer, tuple(inputs[:num_inputs]), tuple(helpers))


def full_text(tokenizer: PreTrainedTokenizerBase, sample: Sample, stage: Stage) -> str:
    """The conversation with every pad written out."""
    text = train_text(tokenizer, sample, latents=stage != "text")
    prompt, answer = text.split(ASSISTANT_MARKER)
    for num_merged in (6, 20)[: len(sample.input_images)]:
        prompt = prompt.replace(IMAGE_PAD, "@" * num_merged, 1)
    return prompt.replace("@", IMAGE_PAD) + ASSISTANT_MARKER + answer.replace(IMAGE_PAD, LATENT_PAD * K)


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
@pytest.mark.parametrize(
    "sample",
    [
        make_sample(),
        make_sample("No slots", "No slot either", num_inputs=2),
        make_sample("No image\n", "\n answer after a newline", num_inputs=0, num_helpers=0),
        make_sample("<image>", "<output_image>", num_inputs=1),
    ],
    ids=["slots", "none", "text", "bare"],
)
def test_ids_are_those_of_the_full_text(
    tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor, sample: Sample, stage: Stage
) -> None:
    encoded = Encoder(tokenizer, image_processor, stage=stage, latent_size=K)(sample)
    text = full_text(tokenizer, sample, stage)
    expected = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoded.input_ids.tolist() == expected["input_ids"]
    # The prompt's end by characters, and the prompt tokenized alone, agree with the end found by ids.
    end = text.index(ASSISTANT_MARKER) + len(ASSISTANT_MARKER)
    assert encoded.prompt_length == sum(start < end for start, _ in expected["offset_mapping"])
    prompt_ids = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
    assert encoded.input_ids[: encoded.prompt_length].tolist() == prompt_ids
    # The supervised tokens are the answer with its markers.
    supervised = encoded.labels[encoded.labels != IGNORE_INDEX]
    assert tokenizer.decode(supervised) == text[end:].replace(LATENT_PAD, "")
    assert encoded.image_mask.sum() == text.count(IMAGE_PAD) == len(encoded.pixel_values) // 4
    assert encoded.latent_mask.sum() == text.count(LATENT_PAD)


def resized(sample: Sample, size: tuple[int, int]) -> Sample:
    return replace(sample, input_images=(image_bytes(size, seed=1), sample.input_images[1]))


@pytest.mark.parametrize("kept", [1, 200, 2**16])
def test_samples_that_were_encoded_before_change_nothing(
    tiny_tokenizer: PreTrainedTokenizerBase,
    image_processor: ImageProcessor,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Texts are kept: equal ones with other images, other numbers of images, and other answers are told apart."""
    monkeypatch.setattr(encode_text, "MAX_KEPT_TOKENS", kept)
    samples = [make_sample(), resized(make_sample(), (112, 56)), resized(make_sample(), (56, 112))]
    samples += [make_sample(answer="No slot"), make_sample(answer="No slot", num_helpers=0), make_sample("<image> a")]
    samples[-1] = replace(samples[-1], input_images=samples[-1].input_images[:1])
    encoder = Encoder(tiny_tokenizer, image_processor, stage="stage2", latent_size=K)
    for sample in samples + samples[::-1]:
        found = encoder(sample)
        fresh = Encoder(tiny_tokenizer, image_processor, stage="stage2", latent_size=K)(sample)
        for item in fields(EncodedSample):
            value, expected = getattr(found, item.name), getattr(fresh, item.name)
            assert torch.equal(value, expected) if isinstance(value, torch.Tensor) else value == expected


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_a_stage_takes_what_it_needs(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor, stage: Stage
) -> None:
    encoded = Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=K)(make_sample())
    assert encoded.image_grid_thw.tolist() == [[1, 4, 6], [1, 8, 10]]
    assert (encoded.pixel_values.shape, encoded.pixel_values.dtype) == ((24 + 80, 588), torch.uint8)
    helpers = {"stage1": [[1, 6, 4]]}.get(stage, [])
    assert encoded.image_grid_thw_latent.tolist() == helpers
    assert encoded.image_grid_thw_latent.shape[1] == 3
    assert encoded.pixel_values_latent.shape == (24 * len(helpers), 588)
    assert encoded.latent_mask.sum() == (0 if stage == "text" else K)
    assert (encoded.key, encoded.latent_sizes) == ("shard/k", [] if stage == "text" else [K])


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_several_blocks_with_their_own_k(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor, stage: Stage
) -> None:
    """The same encoder takes them after each other: texts that differ in K alone are told apart."""
    encoder = Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=K)
    sample = make_sample(answer="<output_image> then <output_image>.", num_helpers=2)
    start, end = (tiny_tokenizer.convert_tokens_to_ids(f"<|latent_{name}|>") for name in ("start", "end"))
    for own in ((), (2, 5), (5, 2)):
        encoded = encoder(replace(sample, latent_sizes=own))
        sizes = [] if stage == "text" else list(own or (K, K))
        assert encoded.latent_sizes == sizes
        ids = encoded.input_ids
        starts, ends = ((ids == each).nonzero().flatten() for each in (start, end))
        assert (ends - starts - 1).tolist() == sizes
        assert encoded.latent_mask.sum() == sum(sizes)
        assert all(encoded.latent_mask[first + 1 : last].all() for first, last in zip(starts, ends, strict=True))
        assert len(encoded.image_grid_thw_latent) == (2 if stage == "stage1" else 0)
        counted = encoder.count_tokens(replace(sample, latent_sizes=own), [(84, 56), (140, 112)])
        assert counted == len(ids)


def test_a_helper_image_that_is_too_small_for_its_own_k(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    sample = replace(make_sample(answer="<output_image><output_image>", num_helpers=2), latent_sizes=(6, 7))
    with pytest.raises(
        DataError,
        match=r"6 merged patches for 7 latents \(shard/k.helper_1\); expected the row's .* another latent_size in the",
    ):
        Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=1)(sample)
    assert Encoder(tiny_tokenizer, image_processor, stage="stage2", latent_size=1)(sample).latent_sizes == [6, 7]


def test_helper_images_are_decoded_only_in_stage_1(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    sample = Sample("shard/k", "Q", "A", (), (b"no image",))
    for stage in ("text", "stage2"):
        Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=K)(sample)
    with pytest.raises(DataError, match=r"cannot be decoded: .*\(shard/k.helper_0\)"):
        Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=K)(sample)


def test_more_latents_than_merged_patches_are_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    assert Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=6)(make_sample()).latent_sizes == [6]
    with pytest.raises(DataError, match=r"6 merged patches for 7 latents \(shard/k.helper_0\)"):
        Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=7)(make_sample())


def test_a_grid_that_does_not_fit_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    """make_sample's helper image has 6 merged patches as 2 x 3 or 3 x 2: five cells in a line do not fit."""
    grid = {"stage": "stage1", "compress_strategy": "grid"}
    assert Encoder(tiny_tokenizer, image_processor, latent_size=6, **grid)(make_sample()).latent_sizes == [6]
    with pytest.raises(
        DataError, match=r"no grid of 5 cells fits .* merged patches \(shard/k.helper_0\); .*=grid a product of two"
    ):
        Encoder(tiny_tokenizer, image_processor, latent_size=5, **grid)(make_sample())


def test_the_index_is_checked_before_a_run(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    """Row 4 has a helper image of 2 x 3 merged patches, the others more; row 7 has two blocks with their own K."""
    rows = [make_row(number) | {"image_input": None, "text_input": "Q"} for number in range(10)]
    write_rows(tmp_path / "rows", 10)
    (tmp_path / "rows" / "images" / "4_1.png").write_bytes(image_bytes((56, 84)))
    rows[7] |= {"text_output": "<output_image> <output_image>", "image_output": ["images/7_1.png", "images/4_1.png"]}
    rows[7] |= {"latent_size": [9, 3]}
    build(write_jsonl(tmp_path / "rows" / "rows.jsonl", rows), tmp_path / "shards", maxcount=4, maxsize=10**9)
    shards = load_manifest(tmp_path / "shards")

    def check(stage: Stage, latent_size: int) -> None:
        check_usable(Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=latent_size), shards)

    check("text", 100)
    check("stage1", 6)
    with pytest.raises(DataError, match=r"6 merged patches for 7 latents \(shard-000001\.tar/000000004\.helper_0\)"):
        check("stage1", 7)
    check("stage2", 7)


def test_blocks_that_are_too_large_are_found_before_a_run(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    """By the row's own K, not the configured one."""
    row = make_row(0) | {"text_output": "<output_image> <output_image>", "image_output": ["images/0_1.png"] * 2}
    write_rows(tmp_path / "rows", 1)
    rows = write_jsonl(tmp_path / "rows" / "rows.jsonl", [row | {"latent_size": [9, 10]}])
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    shards = load_manifest(tmp_path / "shards")
    check_usable(Encoder(tiny_tokenizer, image_processor, stage="stage2", latent_size=1), shards)
    with pytest.raises(DataError, match=r"9 merged patches for 10 latents \(shard-000000\.tar/000000000\.helper_1\)"):
        check_usable(Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=1), shards)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (make_sample(num_inputs=1), r"image slots in text_input: 2, input images: 1 \(shard/k\)"),
        (make_sample(answer="a<|latent_pad|>"), r"text_output contains <\|latent_pad\|> \(shard/k\)"),
        (Sample("shard/k", "Q", "A", (b"no image",)), r"cannot be decoded: .*\(shard/k.input_0\)"),
    ],
)
def test_a_bad_sample_is_named(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor, sample: Sample, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=K)(sample)


@pytest.mark.parametrize("question", [QUESTION, "No slot", "<image><output_image>"])
def test_training_begins_with_the_prompt(tiny_tokenizer: PreTrainedTokenizerBase, question: str) -> None:
    prompt = prompt_text(tiny_tokenizer, make_sample(question))
    text = train_text(tiny_tokenizer, make_sample(question))
    assert text.partition(ASSISTANT_MARKER)[:2] == (prompt.removesuffix(ASSISTANT_MARKER), ASSISTANT_MARKER)


SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.mark.parametrize("question", [QUESTION, "No slot", "<image><output_image>"])
def test_without_the_system_turn_the_rest_of_the_text_is_the_same(
    tiny_tokenizer: PreTrainedTokenizerBase, question: str
) -> None:
    def texts(system_turn: bool) -> list[str]:
        sample = make_sample(question)
        return [text(tiny_tokenizer, sample, system_turn=system_turn) for text in (prompt_text, train_text)]

    assert [SYSTEM_TURN + text for text in texts(False)] == texts(True)


def test_the_encoder_leaves_the_system_turn_out(tmp_path: Path, rows: Path) -> None:
    write_tiny(rows, tmp_path / "tiny", seed=0)
    with_turn, without = (
        load_encoder(str(tmp_path / "tiny"), stage="stage1", latent_size=K, system_turn=turn)(make_sample())
        for turn in (True, False)
    )
    tokenizer = load_tokenizer(str(tmp_path / "tiny"))
    removed = tokenizer(SYSTEM_TURN, add_special_tokens=False)["input_ids"]
    assert with_turn.input_ids.tolist() == removed + without.input_ids.tolist()
    assert torch.equal(with_turn.labels[len(removed) :], without.labels)
    assert torch.equal(with_turn.position_ids[:, len(removed) :] - len(removed), without.position_ids)


def test_a_template_without_a_system_turn_of_its_own(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("loop.first and", "false and")
    text = prompt_text(tokenizer, Sample("", "Q", ""))
    assert text == "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant"
    assert prompt_text(tokenizer, Sample("", "Q", ""), system_turn=False) == text


def test_a_template_whose_earlier_turns_depend_on_later_ones_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ConfigError, match="cannot leave out its system turn"):
        Encoder(tokenizer, image_processor, stage="text", latent_size=K, system_turn=False)


def test_a_longer_sample_is_refused_with_its_key(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    def encode(max_length: int | None) -> int:
        encoder = Encoder(tiny_tokenizer, image_processor, stage="stage2", latent_size=K, max_length=max_length)
        return len(encoder(make_sample()).input_ids)

    length = encode(None)
    assert encode(length) == length
    with pytest.raises(DataError, match=rf"{length} tokens \(shard/k\); data.max_length allows {length - 1}"):
        encode(length - 1)


def test_a_template_that_drops_images_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(IMAGE_PAD, "")
    with pytest.raises(ConfigError, match="the chat template turns an image"):
        Encoder(tokenizer, image_processor, stage="text", latent_size=K)


def test_a_complete_folder_loads(rows: Path, tmp_path: Path) -> None:
    write_tiny(rows, tmp_path / "tiny", seed=0)
    encoded = load_encoder(str(tmp_path / "tiny"), stage="stage1", latent_size=K)(make_sample())
    assert encoded.latent_mask.sum() == K
    (tmp_path / "tiny" / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=f"no chat template .{tmp_path}"):
        load_tokenizer(str(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match=f"no tokenizer .{tmp_path}/none"):
        load_tokenizer(str(tmp_path / "none"))


def test_missing_latent_tokens_are_added_in_order(real_tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As with Qwen2.5-VL from the hub, whose tokenizer ends at 151664."""
    state = real_tokenizer.backend_tokenizer.to_str()
    plain = type(real_tokenizer)(tokenizer_object=Tokenizer.from_str(state))
    plain.chat_template = real_tokenizer.chat_template
    plain.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    names = ["<|latent_pad|>", "<|latent_start|>", "<|latent_end|>"]
    assert tokenizer.convert_tokens_to_ids(names) == [151665, 151666, 151667]


grids = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=4)


@given(grids, st.lists(st.integers(1, 5), min_size=5, max_size=5))
def test_positions_are_those_of_transformers(sides: list[tuple[int, int]], texts: list[int]) -> None:
    """Images of any shape, with text before, between and after them, as in the chat template."""
    ids: list[int] = []
    for (height, width), text in zip(sides, texts, strict=False):
        ids += [0] * text + [1] * (height * width)
    ids += [0] * texts[-1]
    image_mask = torch.tensor(ids).bool()
    grid_thw = torch.tensor([[1, 2 * height, 2 * width] for height, width in sides], dtype=torch.int64).reshape(-1, 3)
    config = SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2, tokens_per_second=2))
    model = SimpleNamespace(config=config)
    model.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(model)
    expected, _ = Qwen2_5_VLModel.get_rope_index(model, image_mask[None].long(), image_mask[None].int(), grid_thw)
    assert torch.equal(mrope_positions(image_mask, grid_thw, merge_size=2), expected[:, 0])


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_the_length_that_is_compared_is_that_of_the_stage(tmp_path: Path, stage: Stage) -> None:
    """Of a row with two blocks of its own K: its length is allowed, one token less is not."""
    folder = write_rows(tmp_path / "rows", 1).parent
    row = make_row(0) | {"image_output": ["images/0_1.png"] * 2, "latent_size": [2, 7]}
    row["text_output"] = "<think> a map </think><output_image> and another <output_image> So \\boxed{A}."
    write_tiny(write_jsonl(folder / "rows.jsonl", [row]), tmp_path / "model", seed=0)
    build(folder / "rows.jsonl", tmp_path / "shards", maxcount=3, maxsize=10**9)
    shards = load_manifest(tmp_path / "shards")
    encoder = load_encoder(str(tmp_path / "model"), stage=stage, latent_size=4)
    encoded = encoder(SampleReader(shards)(0))
    assert int(encoded.latent_mask.sum()) == (0 if stage == "text" else 2 + 7)
    encoder.max_length = len(encoded.input_ids)
    check_usable(encoder, shards)
    encoder.max_length -= 1
    with pytest.raises(
        DataError, match=rf"data\.max_length={encoder.max_length}: 1: .* with {len(encoded.input_ids)};"
    ):
        check_usable(encoder, shards)


def test_longer_samples_are_found_before_the_run(tmp_path: Path) -> None:
    """Only the index and the texts near the limit are read; the lengths are those that the encoder gives."""
    rows = [make_row(number) for number in range(8)]
    for number in (2, 5):
        rows[number]["text_output"] = rows[number]["text_output"].replace("</think>", " and" * 300 + "</think>", 1)
    write_rows(tmp_path / "rows", 8)
    write_jsonl(tmp_path / "rows" / "rows.jsonl", rows)
    write_tiny(tmp_path / "rows" / "rows.jsonl", tmp_path / "model", seed=0)
    build(tmp_path / "rows" / "rows.jsonl", tmp_path / "shards", maxcount=3, maxsize=10**9)
    shards = load_manifest(tmp_path / "shards")
    reader = SampleReader(shards)
    encoder = load_encoder(str(tmp_path / "model"), stage="stage1", latent_size=4)
    lengths = [len(encoder(reader(number)).input_ids) for number in range(8)]
    longest = sorted(lengths)[-1]
    check_usable(encoder, shards)
    encoder.max_length = longest
    check_usable(encoder, shards)
    encoder.max_length = min(lengths[2], lengths[5]) - 1
    with pytest.raises(
        DataError, match=rf"data\.max_length=\d+: 2: .*000000002 with {lengths[2]}, .*05 with {lengths[5]};"
    ):
        check_usable(encoder, shards)
