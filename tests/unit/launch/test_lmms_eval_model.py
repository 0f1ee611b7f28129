"""The model for lmms-eval, by lmms-eval's own evaluator, with a task that is made up: the answers are those of decoding
one question at a time. lmms-eval is not among the packages of the tests; without it this file is skipped."""

import io
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from talkative import write_questions, write_talkative

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2

from launch.lmms_eval_model import MirageModel, manifest, to_sample, until
from mirage_ds.data.collate import collate
from mirage_ds.data.images import decode
from mirage_ds.data.rows import read_json_lines, read_questions
from mirage_ds.errors import ConfigError
from mirage_ds.inference.generate import load_decoder

NUM_ROWS, LATENT_SIZE, MAX_NEW_TOKENS = 5, 3, 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    scales = {"<|latent_start|>": 3.0, "<|im_end|>": 3.0}
    return str(write_talkative(tmp_path_factory.mktemp("model") / "talkative", scales))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "rows", NUM_ROWS)


@pytest.fixture(scope="module")
def answers(model: str, questions: Path) -> list[str]:
    """One question at a time."""
    decoder, encoder = load_decoder(model, latent_size=LATENT_SIZE, max_new_tokens=MAX_NEW_TOKENS, dtype=torch.float32)
    found = []
    for _, sample in read_questions(questions):
        (answer,) = decoder.generate(collate([encoder.prompt(sample)], align_latents=True))
        found.append(encoder.text_of(answer.ids).strip())  # as lmms-eval hands answers to a task
    return found


def messages_of(row: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """A row's question as lmms-eval has it."""
    images = [{"type": "image", "url": Image.open(folder / path)} for path in row["image_input"]]
    first, *texts = [{"type": "text", "text": text} for text in row["text_input"].split("<image>")]
    content = [first, *chain.from_iterable(zip(images, texts, strict=True))] if texts else [*images, first]
    return [{"role": "user", "content": content}]


def test_the_evaluator_scores_its_answers(
    model: str, questions: Path, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row for _, row in read_json_lines(questions)]
    seen: list[str] = []

    def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        seen.append(results[0])
        return {"right": float(results[0] == answers[doc["number"]] and doc["number"] != 1)}

    import datasets

    table = datasets.Dataset.from_list([{"number": number} for number in range(NUM_ROWS)])
    monkeypatch.setattr(
        ConfigurableMessagesTask,
        "download",
        lambda self, *args, **kwargs: self.__dict__.update(
            dataset=datasets.DatasetDict(test=table), dataset_no_image=datasets.DatasetDict(test=table)
        ),
    )
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    task = ConfigurableMessagesTask(
        config={
            "task": "made_up",
            "dataset_path": "made_up",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": lambda doc: [],
            "doc_to_text": lambda doc: "",
            "doc_to_target": "",
            "doc_to_messages": lambda doc: messages_of(rows[doc["number"]], questions.parent),
            "process_results": score,
            "generation_kwargs": {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 0, "do_sample": False},
            "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
        },
        model_name="mirage",
    )
    results = simple_evaluate(
        model="mirage",
        model_args=f"pretrained={model},latent_size={LATENT_SIZE},dtype=fp32",
        tasks=[task],
        batch_size=2,
    )
    assert seen == answers
    assert len(set(answers)) > 1
    assert results["results"]["made_up"]["right,none"] == (NUM_ROWS - 1) / NUM_ROWS


def test_messages_become_a_question_with_its_context() -> None:
    buffer = io.BytesIO()
    image = Image.new("RGB", (30, 20), "red")
    image.save(buffer, format="PNG")
    said = {"type": "image", "url": image}, {"type": "text", "text": "What?"}
    sample = to_sample(
        [
            {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
            {"role": "user", "content": list(said)},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
            {"role": "user", "content": list(said)[::-1]},
        ],
        "task/test/0",
    )
    assert [(turn.role, turn.text) for turn in sample.context] == [
        ("system", "Be brief."),
        ("human", "<image>What?"),
        ("gpt", "Red."),
    ]
    assert sample.text_input == "What?<image>"
    assert sample.input_images == (buffer.getvalue(),) * 2
    with pytest.raises(ConfigError, match=r"a question with video \(task/test/0\)"):
        to_sample([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "task/test/0")
    with pytest.raises(ConfigError, match="the last message is from assistant"):
        to_sample([{"role": "assistant", "content": [{"type": "text", "text": "!"}]}], "task/test/0")


def test_where_an_answer_ends() -> None:
    assert until("a\n\nb<end>c", {"until": ["\n\n", "<end>"]}) == "a\n\nb"
    assert until("a", {}) == "a"


def asked(model: MirageModel, messages: list[Any], settings: dict[str, Any], *, times: int = 1) -> list[str]:
    """The answers to each question `times` times, as lmms-eval asks with `repeats`."""
    model.task_dict = {"made_up": {"test": messages}}
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", lambda doc: doc, dict(settings), number, "made_up", "test"),
            idx=0,
            metadata={"task": "made_up", "doc_id": number, "repeats": times},
        )
        for number in range(len(messages))
    ]
    return model.generate_until([request for request in requests for _ in range(times)])


@pytest.fixture(scope="module")
def loaded(model: str) -> MirageModel:
    return MirageModel(model, latent_size=LATENT_SIZE, dtype="fp32", batch_size=4)


@pytest.fixture
def messages(questions: Path) -> list[Any]:
    return [messages_of(row, questions.parent) for _, row in read_json_lines(questions)]


def test_settings_of_decoding(loaded: MirageModel, messages: list[Any], answers: list[str]) -> None:
    """lmms-eval's own default settings are those of a task that names none; None is as good as left out."""
    default = {"until": ["\n\n"], "do_sample": False}
    greedy = asked(loaded, messages, default)
    assert [answer.strip()[: len(text)] for answer, text in zip(greedy, answers, strict=True)] == answers
    named = {"max_new_tokens": None, "temperature": None, "top_p": None, "num_beams": None, "top_k": 5}
    assert asked(loaded, messages, default | named) == greedy
    assert asked(loaded, messages, {"temperature": 0.0, "max_new_tokens": 1024}) == greedy
    for settings, message in (
        ({"do_sample": True}, "do_sample without a temperature"),
        ({"do_sample": True, "temperature": 1.0, "top_k": 5}, "top_k 5"),
        ({"repetition_penalty": 1.1}, "repetition_penalty 1.1"),
        ({"num_beams": 3}, "num_beams 3"),
    ):
        with pytest.raises(ConfigError, match=message):
            asked(loaded, messages, settings)


def test_repetitions_draw_on_their_own(loaded: MirageModel, messages: list[Any]) -> None:
    settings = {"max_new_tokens": MAX_NEW_TOKENS, "temperature": 1.5}
    answers = asked(loaded, messages, settings, times=3)
    assert any(len(set(answers[start : start + 3])) > 1 for start in range(0, len(answers), 3))
    assert answers[::3] == asked(loaded, messages, settings)


def test_a_question_that_cannot_be_asked(
    loaded: MirageModel, messages: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """One with special tokens; a tag of an image in a text is none of them, and is removed."""
    expected = asked(loaded, messages, {"max_new_tokens": MAX_NEW_TOKENS})
    messages[0][0]["content"][-1]["text"] += "<|im_end|>"
    messages[1][0]["content"][-1]["text"] += "<image><output_image>"
    assert asked(loaded, messages, {"max_new_tokens": MAX_NEW_TOKENS}) == ["", *expected[1:]]
    assert "<|im_end|> (made_up/test/0/0)" in caplog.text
    assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", ["alpha", "palette", "16 bits", "turned", "CMYK"])
def test_images_are_shown_as_their_files_are(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (20, 30), dtype=np.uint16)
    colours = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8), "RGBA")
    path = tmp_path / f"image.{'jpg' if kind in ('turned', 'CMYK') else 'png'}"
    if kind == "turned":
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        colours.convert("RGB").save(path, exif=exif)
    elif kind == "CMYK":
        colours.convert("RGB").convert("CMYK").save(path)
    elif kind == "palette":
        colours.convert("RGB").quantize(16).save(path, transparency=3)
    else:
        (colours if kind == "alpha" else Image.fromarray(values)).save(path)
    for url in (Image.open(path), str(path)):
        (image,) = to_sample([{"role": "user", "content": [{"type": "image", "url": url}]}], "").input_images
        shown, expected = decode(image, ""), decode(path.read_bytes(), "")
        assert np.array_equal(np.asarray(shown), np.asarray(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": "auto"}, "batch_size auto"), ({"device": "tpu"}, "device tpu")],
)
def test_options_that_cannot_be_honoured(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MirageModel(model, latent_size=LATENT_SIZE, **options)
