"""An exported folder decodes with latents in plain transformers, as `mirage generate` does."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from generated_rows import image_bytes, write_jsonl
from joint_processor import joint_processor
from plain_inputs import plain_inputs, read_rows
from talkative import write_questions, write_talkative
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen2_5_VLForConditionalGeneration,
    StoppingCriteria,
)
from transformers.generation.streamers import BaseStreamer
from zero3_files import write_run

from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.rows import Sample, read_questions
from mirage_ds.hf.custom_generate.generate import mrope_positions
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.inference.generate import Decoder, Generation, load_decoder
from mirage_ds.inference.sampling import Sampling
from mirage_ds.tokens import TokenIds

ROOT = Path(__file__).parents[3]
NUM_PROMPTS, MAX_NEW_TOKENS, LATENT_SIZE = 32, 24, 3
SCALES = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports, and the questions `asked`.

    `sees` and `hides`: whose answers see their images, and do not. `closing-sees` and `closing-hides`: which choose the
    end of a block, and hardly ever that of an answer. `text`: without latents.
    """
    folder = tmp_path_factory.mktemp("self-decoding")
    for kind in ("", "closing-"):
        (folder / f"{kind}base").mkdir()
        model = write_talkative(folder / f"{kind}base", SCALES, closes_blocks=bool(kind))
        loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
        weights = {name: parameter.detach() for name, parameter in loaded.named_parameters()}
        for name, stage in (("sees", "stage2"), ("hides", "stage1"), *([] if kind else [("text", "text")])):
            settings = {
                "model": {"latent_size": LATENT_SIZE, "answer_sees_image": name != "hides"},
                "train": {"stage": stage, "dtype": "fp32"},
            }
            run = write_run(folder / f"run-{kind}{name}", model, weights, settings=settings)
            export_checkpoint(run, folder / f"{kind}{name}")
    write_questions(folder / "asked", NUM_PROMPTS)
    return folder


def load(folder: Path, name: str = "sees", **settings: Any) -> Any:
    """The model as a user loads it, with the file of its folder."""
    return AutoModelForImageTextToText.from_pretrained(
        folder / name, **({"dtype": torch.float32, "trust_remote_code": True} | settings)
    )


def inputs_of(folder: Path, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    questions = folder / "asked" / "questions.jsonl"
    return plain_inputs(folder / "sees", read_rows(questions)[rows], questions.parent)


def decoder_of(folder: Path, name: str = "sees", **settings: Any) -> tuple[Decoder, list[EncodedSample]]:
    """Our decoder, and the prompts."""
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "dtype": torch.float32} | settings
    decoder, encoder = load_decoder(str(folder / name), **settings)
    return decoder, [encoder.prompt(sample) for sample in samples(folder)]


def samples(folder: Path) -> list[Sample]:
    return [sample for _, sample in read_questions(folder / "asked" / "questions.jsonl")]


def answers(sequences: torch.Tensor, inputs: dict[str, torch.Tensor]) -> list[list[int]]:
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def blocks_of(row: Generation, ids: TokenIds) -> list[list[torch.Tensor]]:
    """The states of a row by the blocks that its ids open."""
    states, blocks = iter(row.latents), []
    for token in row.ids:
        if token == ids.latent_start:
            blocks.append([])
        if token == ids.latent_pad:
            blocks[-1].append(next(states))
    return blocks


def check_equal(output: Any, inputs: dict[str, torch.Tensor], wanted: list[Generation], ids: TokenIds) -> int:
    """Ids and latents of each row, block by block; returns the largest number of blocks of a row."""
    for emitted, blocks, row in zip(answers(output.sequences, inputs), output.latents, wanted, strict=True):
        assert emitted == row.ids + [ids.end_of_text] * (len(emitted) - len(row.ids))
        for block, states in zip(blocks, blocks_of(row, ids), strict=True):
            assert len(block) == len(states)
            for found, expected in zip(block, states, strict=True):
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the dtype too
    return max(len(blocks) for blocks in output.latents)


@pytest.mark.parametrize(
    ("name", "latent_end"),
    [("sees", "fixed"), ("hides", "fixed"), ("closing-sees", "model"), ("closing-hides", "model")],
)
def test_answers_are_those_of_the_decoder(folder: Path, name: str, latent_end: str) -> None:
    """32 prompts of no, one or two images, together and one by one; ids, latents and their blocks."""
    decoder, rows = decoder_of(folder, name, latent_end=latent_end)
    model, inputs = load(folder, name), inputs_of(folder)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "latent_end": latent_end, "return_dict_in_generate": True}
    wanted = decoder.generate(collate(rows, align_latents=True))
    output = model.generate(**inputs, **options)
    assert check_equal(output, inputs, wanted, decoder.ids) >= 3
    if latent_end == "fixed":
        assert len({len(row.ids) for row in wanted}) >= 4
    else:
        assert len({len(block) for blocks in output.latents for block in blocks}) >= 3
    for number, row in enumerate(rows):
        alone = inputs_of(folder, slice(number, number + 1))
        one = decoder.generate(collate([row], align_latents=True))
        check_equal(model.generate(**alone, **options), alone, one, decoder.ids)


def test_what_is_compared_differs(folder: Path) -> None:
    """Between the two ends of a block, and between answers that see their images and that do not."""
    inputs, found = inputs_of(folder), set()
    for name in ("closing-sees", "closing-hides"):
        model = load(folder, name)
        for end in ("fixed", "model"):
            found.add(str(model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, latent_end=end).tolist()))
    assert len(found) == 4


def test_a_model_that_is_told_which_file_to_use(folder: Path) -> None:
    """With the folder's name as `custom_generate`, of a model that was loaded without the file, or with it."""
    inputs = inputs_of(folder, slice(6))
    wanted = load(folder).generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    named = {"custom_generate": str(folder / "sees"), "trust_remote_code": True}
    for trusted in (False, True):
        model = load(folder, trust_remote_code=trusted)
        assert torch.equal(model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, **named), wanted)
    plain = load(folder, trust_remote_code=False)
    as_text = plain.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    assert not torch.equal(as_text, wanted)
    assert torch.equal(type(plain).generate(load(folder), **inputs, max_new_tokens=MAX_NEW_TOKENS), as_text)


def test_latent_size_and_prompts_without_images(folder: Path) -> None:
    decoder, rows = decoder_of(folder, latent_size=5)
    inputs = inputs_of(folder, slice(0, None, 3))
    assert "pixel_values" not in inputs
    output = load(folder).generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=MAX_NEW_TOKENS,
        latent_size=5,
        return_dict_in_generate=True,
    )
    wanted = decoder.generate(collate(rows[::3], align_latents=True))
    assert check_equal(output, inputs, wanted, decoder.ids) >= 1
    assert max(len(block) for blocks in output.latents for block in blocks) == 5


def test_prompts_of_several_turns(folder: Path, tmp_path: Path) -> None:
    """With images in several of them; earlier answers as text."""
    conversations = [
        ["<image> What?", "A plan.", "reach <image> now?"],
        ["the plan", "No.", "<image>Why?", "So.", "the plan <image> reach"],
        ["the plan", "Yes.", "reach?"],
    ]
    rows: list[dict[str, Any]] = []
    for number, said in enumerate(conversations):
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
        names = [f"{number}_{place}.png" for place in range(sum(text.count("<image>") for text in said))]
        for place, name in enumerate(names):
            (tmp_path / name).write_bytes(image_bytes((56 + 28 * place, 84 + 28 * number), seed=place))
        rows.append({"conversations": turns, "image_input": names})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    decoder, encoder = load_decoder(str(folder / "sees"), max_new_tokens=MAX_NEW_TOKENS, dtype=torch.float32)
    prompts = [encoder.prompt(sample) for _, sample in read_questions(tmp_path / "rows.jsonl")]
    inputs = plain_inputs(folder / "sees", rows, tmp_path)
    output = load(folder).generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, return_dict_in_generate=True)
    wanted = decoder.generate(collate(prompts, align_latents=True))
    assert check_equal(output, inputs, wanted, decoder.ids) >= 1


def test_draws_of_a_seed_are_those_of_mirage_generate(folder: Path) -> None:
    """Of the one question of `mirage generate`, and of rows with keys, as `mirage evaluate` has them."""
    decoder, rows = decoder_of(folder, sampling=Sampling(0.7, 0.9, seed=5))
    model, inputs = load(folder), inputs_of(folder)
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}
    options["return_dict_in_generate"] = True
    keys = [row.key for row in rows]
    wanted = decoder.generate(collate(rows, align_latents=True))
    assert check_equal(model.generate(**inputs, **options, seed=5, keys=keys), inputs, wanted, decoder.ids) >= 2
    other = model.generate(**inputs, **options, seed=6, keys=keys).sequences
    assert answers(other, inputs) != answers(model.generate(**inputs, **options, seed=5).sequences, inputs)
    for number in range(0, NUM_PROMPTS, 4):
        alone = inputs_of(folder, slice(number, number + 1))
        one = decoder.generate(collate([replace(rows[number], key="prompt")], align_latents=True))
        check_equal(model.generate(**alone, **options, seed=5), alone, one, decoder.ids)


def test_without_a_seed_torch_draws(folder: Path) -> None:
    model, inputs = load(folder), inputs_of(folder, slice(8))
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=True, temperature=1.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_several_answers_to_a_prompt(folder: Path) -> None:
    """Each as if its prompt had been given as often; with images."""
    model, inputs = load(folder), inputs_of(folder, slice(1, 4))
    options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0, "seed": 3}
    keys = [f"{row}-{copy}" for row in range(3) for copy in range(2)]
    output = model.generate(**inputs, **options, num_return_sequences=2, keys=keys, return_dict_in_generate=True)
    assert len(output.sequences) == len(output.latents) == 6
    for copy in range(2):
        alone = model.generate(**inputs, **options, keys=keys[copy::2], return_dict_in_generate=True)
        length = alone.sequences.shape[1]
        assert torch.equal(output.sequences[copy::2, :length], alone.sequences)
    with pytest.raises(ValueError, match="0 keys for 6 rows; expected one for each"):
        model.generate(**inputs, **options, num_return_sequences=2)


class Collector(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


class EndsRows(StoppingCriteria):
    """Ends row n after n + 2 tokens."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return input_ids.shape[1] - self.prompt_length >= torch.arange(len(input_ids)) + 2


def test_streamer_and_limits(folder: Path) -> None:
    model, inputs = load(folder), inputs_of(folder, slice(1, 2))
    streamer = Collector()
    length = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_length=length + 9, streamer=streamer)
    assert streamer.ended == 1
    assert torch.equal(torch.cat([value.flatten() for value in streamer.values]), found[0])
    assert len(streamer.values) == found.shape[1] - length + 1 <= 10
    assert torch.equal(found, model.generate(**inputs, max_new_tokens=9))


def test_stopping_criteria_end_rows_by_themselves(folder: Path) -> None:
    """An ended row emits padding, and has no more latents."""
    model, inputs = load(folder), inputs_of(folder)
    criteria = [EndsRows(inputs["input_ids"].shape[1])]
    options = {"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True}
    stopped = model.generate(**inputs, **options, stopping_criteria=criteria)
    free = model.generate(**inputs, **options)
    pad = model.generation_config.pad_token_id
    cut_off = 0
    for row, (short, full) in enumerate(zip(*(answers(o.sequences, inputs) for o in (stopped, free)), strict=True)):
        kept = [*full, *[pad] * MAX_NEW_TOKENS][: min(row + 2, MAX_NEW_TOKENS)]
        assert short == kept + [pad] * (len(short) - len(kept))
        states = [state for block in stopped.latents[row] for state in block]
        assert len(states) == kept.count(model.config.mirage["latent_token_ids"]["pad"])
        cut_off += bool(stopped.latents[row]) and len(stopped.latents[row][-1]) < LATENT_SIZE
    assert cut_off >= 2, "in the middle of a block"


def test_a_stop_string_ends_the_rows_that_write_it(folder: Path) -> None:
    model, inputs = load(folder), inputs_of(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "sees")
    full = answers(model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS), inputs)
    words = [word for ids in full for word in map(tokenizer.decode, ids[1:]) if word.isascii() and word.isalpha()]
    word, pad = max(words, key=len), model.generation_config.pad_token_id
    stopped = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, stop_strings=word, tokenizer=tokenizer)
    num_stopped = 0
    for ids, short in zip(full, answers(stopped, inputs), strict=True):
        ends = [end for end in range(1, len(ids)) if word in tokenizer.decode(ids[:end])]
        kept = ids[: ends[0]] if ends else ids
        assert short == kept + [pad] * (len(short) - len(kept))
        num_stopped += bool(ends)
    assert 1 <= num_stopped < NUM_PROMPTS


def test_logits_processors_choose_too(folder: Path) -> None:
    model, inputs = load(folder), inputs_of(folder)
    start = model.config.mirage["latent_token_ids"]["start"]
    assert start in model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
    assert start not in model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, suppress_tokens=[start])


def test_scores_and_logits(folder: Path) -> None:
    """One for each emitted token; what the model chose is the likeliest by its score."""
    model, inputs = load(folder), inputs_of(folder, slice(4))
    output = model.generate(
        **inputs, max_new_tokens=6, output_scores=True, output_logits=True, return_dict_in_generate=True
    )
    ids = model.config.mirage["latent_token_ids"]
    emitted = output.sequences[:, inputs["input_ids"].shape[1] :]
    assert len(output.scores) == len(output.logits) == emitted.shape[1]
    for place, scores in enumerate(output.scores):
        chosen = scores.argmax(dim=-1)
        forced = torch.isin(
            emitted[:, place], torch.tensor([ids["pad"], ids["end"], model.generation_config.pad_token_id])
        )
        assert torch.equal(chosen[~forced], emitted[:, place][~forced])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "the generation mode beam_search"),
        ({"use_cache": False}, "use_cache=False"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output of attentions or states"),
        ({"prompt_lookup_num_tokens": 2}, "the generation mode assisted_generation"),
        ({"past_key_values": DynamicCache()}, "past_key_values cannot be given.*whole conversation"),
        ({"inputs_embeds": torch.zeros(1, 4, 128)}, "inputs_embeds cannot be given.*give input_ids"),
        ({"position_ids": torch.zeros(3, 1, 4, dtype=torch.int64)}, "position_ids cannot be given"),
        ({"synced_gpus": True}, "synced_gpus cannot be given"),
        ({"latent_size": 0}, r"latent_size=0.*at least 1"),
        ({"latent_end": "never"}, "latent_end='never'; expected .*`fixed` or `model`"),
        ({"stop_strings": "a"}, "stop_strings without a tokenizer"),
        ({"token_healing": True}, "token_healing in the configuration"),
        ({"seed": 1, "do_sample": False}, "seed without do_sample=True; expected both"),
        ({"do_sample": True, "keys": ["a"]}, "keys without seed"),
        ({"do_sample": True, "seed": 1, "keys": ["a", "b"]}, "2 keys for 1 rows"),
        ({"latent_ends": "model"}, "latent_ends"),
    ],
)
def test_what_cannot_be_had_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(folder).generate(**inputs_of(folder, slice(1, 2)), **options)


def test_prompts_that_cannot_be_decoded(folder: Path) -> None:
    model, inputs = load(folder), inputs_of(folder, slice(1, 3))
    mask = inputs["attention_mask"]
    with pytest.raises(ValueError, match=r"the image pads .* not those of 3 images"):  # the images of another order
        model.generate(**inputs | {"input_ids": inputs["input_ids"].flip(0), "attention_mask": mask.flip(0)})
    with pytest.raises(ValueError, match="padding on the right"):
        model.generate(
            **{
                name: value.flip(1) if "pixel" not in name else value
                for name, value in inputs.items()
                if name in ("input_ids", "attention_mask")
            }
        )
    with_latent = inputs["input_ids"].clone()
    with_latent[:, -2] = model.config.mirage["latent_token_ids"]["pad"]
    with pytest.raises(ValueError, match="state that was fed there is not known"):
        model.generate(**inputs | {"input_ids": with_latent})
    model.config.mirage = None
    with pytest.raises(ValueError, match=r"the number of latents is not known .*load the folder"):
        model.generate(**inputs)


def test_logits_that_are_not_finite_are_refused(folder: Path) -> None:
    """As by `mirage generate`: of a row that continues, whatever those of an ended one are."""
    model, inputs = load(folder), inputs_of(folder, slice(1, 2))
    first = int(model.generate(**inputs, max_new_tokens=1)[0, -1])
    with torch.no_grad():
        model.get_input_embeddings().weight[first] = torch.nan
    model.generate(**inputs, max_new_tokens=1)  # it is not fed
    with pytest.raises(ValueError, match=r"logits not finite .*try dtype=torch.float32"):
        model.generate(**inputs, max_new_tokens=3)
    model.generate(**inputs, max_new_tokens=3, eos_token_id=first)  # the row has ended before


def test_the_output_has_no_cache(folder: Path) -> None:
    """transformers' own decoding would continue from it at other positions."""
    options = {"max_new_tokens": 3, "return_dict_in_generate": True, "output_logits": True}
    output = load(folder).generate(**inputs_of(folder, slice(1, 2)), **options)
    assert set(output) == {"sequences", "logits", "latents"}


@pytest.mark.parametrize("settings", [{"token_healing": True}, {"stop_strings": ["a"]}])
def test_what_a_configuration_cannot_have(folder: Path, settings: dict[str, Any]) -> None:
    """Given by name, by place, or the model's own."""
    model, inputs = load(folder), inputs_of(folder, slice(0, 1))
    config = GenerationConfig(max_new_tokens=3, **settings)
    message = f"{next(iter(settings))} in the configuration; expected none there"
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs, generation_config=config)
    with pytest.raises(ValueError, match=message):
        model.generate(inputs["input_ids"], config, attention_mask=inputs["attention_mask"])
    model.generation_config = config
    with pytest.raises(ValueError, match=message):
        model.generate(**inputs)


def test_a_model_that_is_sharded_is_refused(folder: Path) -> None:
    """Under ZeRO-3 ranks would wait for one that has ended."""
    model = load(folder)
    model.lm_head.weight.ds_id = 7
    with pytest.raises(ValueError, match=r"weights sharded by ZeRO-3 .*of a whole model"):
        model.generate(**inputs_of(folder, slice(1, 2)), max_new_tokens=3)


def test_bf16(folder: Path) -> None:
    """Of prompts without images, the same bits as our decoder in bf16."""
    decoder, rows = decoder_of(folder, dtype=torch.bfloat16)
    wanted = decoder.generate(collate(rows[::3], align_latents=True))
    inputs = inputs_of(folder, slice(0, None, 3))
    options = {"max_new_tokens": MAX_NEW_TOKENS, "return_dict_in_generate": True}
    output = load(folder, dtype=torch.bfloat16).generate(**inputs, **options)
    assert check_equal(output, inputs, wanted, decoder.ids) >= 1
    assert output.latents[next(n for n, blocks in enumerate(output.latents) if blocks)][0].dtype == torch.bfloat16


def test_a_model_that_keeps_no_cache_is_an_error(folder: Path) -> None:
    """As with gradient checkpointing in training mode, which drops it."""
    model = load(folder)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match=r"the cache has 0 columns.*call model.eval"):
        model.generate(**inputs_of(folder, slice(1, 2)), max_new_tokens=3)


def test_after_text_it_decodes_as_text(folder: Path) -> None:
    """With all that transformers has; the options of latents are refused."""
    model, inputs = load(folder, "text"), inputs_of(folder, slice(6))
    plain = load(folder, "text", trust_remote_code=False)
    for options in ({}, {"num_beams": 2}):
        options |= {"max_new_tokens": MAX_NEW_TOKENS}
        assert torch.equal(model.generate(**inputs, **options), plain.generate(**inputs, **options))
    with pytest.raises(ValueError, match="latent_size, seed for a model without latents"):
        model.generate(**inputs, latent_size=3, seed=1)


def test_the_lines_of_the_model_card(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They print what the loaded model answers to the chat template's prompt."""
    if not importlib.util.find_spec("torchvision"):
        monkeypatch.setattr(AutoProcessor, "from_pretrained", joint_processor)
    code = (folder / "sees" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    processor, shown = joint_processor(folder / "sees"), set()
    for row in read_rows(folder / "asked" / "questions.jsonl")[1:12:3]:
        image = folder / "asked" / row["image_input"][0]
        exec(
            code.replace("FOLDER", str(folder / "sees"))
            .replace("IMAGE.png", str(image))
            .replace("QUESTION", "Where?" + row["text_input"])
            .replace("max_new_tokens=1024", f"max_new_tokens={MAX_NEW_TOKENS}")
        )
        content = [{"type": "image", "path": str(image)}, {"type": "text", "text": "Where?" + row["text_input"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        output = load(folder).generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, return_dict_in_generate=True)
        text = processor.decode(answers(output.sequences, inputs)[0], skip_special_tokens=True)
        assert repr(text) in capsys.readouterr().out
        shown.add(len(output.latents[0]))
    assert shown != {0}


def test_positions_are_those_of_transformers(folder: Path) -> None:
    """Of conversations of several turns, with images in any of them, padded on the left, and of text alone."""
    model = load(folder)
    image, merge = model.config.image_token_id, model.config.vision_config.spatial_merge_size
    grids = [(1, 4, 6), (1, 8, 4), (1, 2, 2), (1, 6, 6)]
    one, two, three, four = ([image] * (height * width // merge**2) for _, height, width in grids)
    rows = [[5, *one, 6, 7, 8, *two, 9], [5, 6, 7], [*three, 5, *four, 6, 7, 8, 9, 5, 5]]
    length = max(map(len, rows))
    ids = torch.tensor([[1] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    expected, _ = model.model.get_rope_index(
        ids, (ids == image).long(), image_grid_thw=torch.tensor(grids), attention_mask=mask
    )
    found = mrope_positions(ids == image, mask.bool(), grids, merge)
    assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_process_without_mirage_ds_elsewhere_offline(folder: Path, tmp_path: Path) -> None:
    """A copy of the folder, in a process that cannot import mirage_ds."""
    shutil.copytree(folder / "sees", tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()
    script, rows = ROOT / "tests" / "versions" / "plain_decode.py", folder / "asked" / "questions.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "mine"), str(rows), str(tmp_path / "result.json")],
        cwd=tmp_path / "elsewhere",
        env=environment | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    found = json.loads((tmp_path / "result.json").read_text())
    decoder, prompts = decoder_of(folder)
    wanted = [row.ids for row in decoder.generate(collate(prompts, align_latents=True))]
    for way in ("loaded", "named", "alone"):
        assert [ids[: len(row)] for ids, row in zip(found[way], wanted, strict=True)] == wanted, way
    assert found["text"] == found["untrusted"] != found["loaded"]
