"""The model for lmms-eval, by lmms-eval's own evaluator, with a task that is made up: the answers are those of decoding
one question at a time. lmms-eval is not among the packages of the tests; without it this file is skipped."""

import io
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from talkative import write_questions, write_talkative

pytest.importorskip("lmms_eval")

from lmms_eval.api.task import ConfigurableMessagesTask
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2

from launch.lmms_eval_model import MirageModel, manifest, to_sample, until
from mirage_ds.data.collate import collate
from mirage_ds.data.rows import read_json_lines, read_questions
from mirage_ds.errors import ConfigError, DataError
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
    with pytest.raises(DataError, match=r"a question with video \(task/test/0\)"):
        to_sample([{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}], "task/test/0")
    with pytest.raises(DataError, match="the last message is from assistant"):
        to_sample([{"role": "assistant", "content": [{"type": "text", "text": "!"}]}], "task/test/0")


def test_where_an_answer_ends() -> None:
    assert until("a\n\nb<end>c", {"until": ["\n\n", "<end>"]}) == "a\n\nb"
    assert until("a", {}) == "a"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": "auto"}, "batch_size auto"), ({"device": "tpu"}, "device tpu")],
)
def test_options_that_cannot_be_honoured(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MirageModel(model, latent_size=LATENT_SIZE, **options)
