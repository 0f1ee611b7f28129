"""Evaluation in training under ZeRO-3, on 2 ranks: its answers, and that training does not notice it."""

import json
import shutil
from pathlib import Path
from typing import Any

import evaluation_worker
import launching
import pytest
from talkative import write_questions, write_talkative
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Qwen2_5_VLForConditionalGeneration
from typer.testing import CliRunner

from data_tools.build import build
from mirage_ds.cli import app
from mirage_ds.evaluation.training.looks import LATENT_MARK
from mirage_ds.hf.export import export_checkpoint

# At the 17th token of one row two logits are equal but for rounding, which depends on the batch: answers end before it.
STEPS, INTERVAL, NUM_ROWS, MAX_NEW_TOKENS = 3, 2, 11, 16
ROOT = Path(__file__).parents[2]
# With the shipped limits, small weights stay gathered on every rank between two uses.
DEEPSPEED_CONFIGS = {
    "stage1-untied": "shipped limits",
    "stage1-tied": "plain",
    "stage2-untied": "plain",
    "stage2-tied": "parameters on the host",
}
RUNS = {name: name.split("-") for name in DEEPSPEED_CONFIGS}
SCORED = "stage2-untied"
HIDDEN = "stage1-tied"  # after a block, answers do not see the images
SCORE = """
def score(row, answer):
    return (len(answer) + row["id"]) % 3 == 0
"""
ARMS = "own,zeroed,mean"


def task(folder: Path, name: str) -> str:
    """A function of the answer's length, which is right for some answers and wrong for others."""
    return f"{folder / 'task.py'}:score" if name == SCORED else "none"


def overrides(folder: Path, deepspeed_config: str, name: str, *, evaluated: bool) -> list[str]:
    stage, tied = RUNS[name]
    evaluation = [
        f"evaluation.task={task(folder, name)}",
        f"evaluation.rows={folder / 'questions' / 'questions.jsonl'}",
        f"evaluation.latents='{ARMS}'",
        f"evaluation.max_new_tokens={MAX_NEW_TOKENS}",
        "evaluation.batch_size=2",
    ]
    return [
        f"train.stage={stage}",
        f"model.path={folder / tied / 'model'}",
        f"data.shards={folder / 'shards'}",
        f"run.dir={folder / f'{name}-{evaluated}'}",
        f"train.max_steps={STEPS}",
        "train.warmup_steps=1",
        "train.lr=2e-5",
        f"checkpoint.interval={INTERVAL}",
        f"evaluation.interval={INTERVAL}",
        f"evaluation.shards={folder / 'shards'}",
        "evaluation.max_samples=3",
        f"distributed.deepspeed_config={deepspeed_config}",
        f"model.answer_sees_image={'false' if name == HIDDEN else 'true'}",
        *(evaluation if evaluated else []),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, deepspeed_configs: dict[str, str]) -> Path:
    """Every run with and without evaluation, in one start of two ranks."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = write_talkative(folder / "untied")
    shutil.copytree(model, folder / "tied" / "model")
    tied = Qwen2_5_VLForConditionalGeneration.from_pretrained(model)
    tied.model.language_model.embed_tokens.weight.data.copy_(tied.lm_head.weight.data)
    for name, parameter in tied.named_parameters():
        if "language_model.layers." in name and parameter.dim() > 1:
            parameter.data *= 16  # beside the large embeddings; else each token is followed by itself
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(folder / "tied" / "model")
    build(folder / "untied" / "rows" / "rows.jsonl", folder / "shards", maxcount=4, maxsize=10**9)
    write_questions(folder / "questions", NUM_ROWS)
    (folder / "task.py").write_text(SCORE)
    configs = deepspeed_configs | {
        "shipped limits": str(ROOT / "ds_configs" / "zero3.json"),
        "parameters on the host": str(folder / "offload.json"),
    }
    plain = json.loads(Path(deepspeed_configs["plain"]).read_text())
    # Without `offload_optimizer`, for which DeepSpeed would compile an op; an evaluation does not meet it.
    plain["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": True}
    (folder / "offload.json").write_text(json.dumps(plain))
    wanted = [
        overrides(folder, configs[kind], name, evaluated=evaluated)
        for name, kind in DEEPSPEED_CONFIGS.items()
        for evaluated in (False, True)
    ]
    with launching.start(2, wanted, main=evaluation_worker.main, log=folder / "log") as ranks:
        ranks.finish(timeout_s=900)
    return folder


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", RUNS)
def test_training_does_not_notice(runs: Path, name: str) -> None:
    """Losses, gradient norms and validation losses are the same bits."""
    for file, steps in (("metrics.jsonl", STEPS), ("validation.jsonl", 2)):
        without, evaluated = (records(runs / f"{name}-{evaluated}" / file) for evaluated in (False, True))
        assert len(without) == steps
        for ours, reference in zip(evaluated, without, strict=True):
            assert ours["loss_hex"] == reference["loss_hex"]
            assert ours.get("grad_norm") == reference.get("grad_norm")


@pytest.mark.parametrize("name", RUNS)
def test_latent_health_is_taken_from_the_latents(runs: Path, name: str) -> None:
    """In stage 1 the mean cosine to the targets is 1 - the latent loss, as all rows have one K."""
    for record in records(runs / f"{name}-True" / "metrics.jsonl"):
        cosines = record["latents"]["target_cosine"]
        if name.startswith("stage1"):
            assert sum(cosines) / len(cosines) == pytest.approx(record["cosine"], abs=1e-5)
        else:
            assert cosines == [None] * 4
        assert all(-1 < cosine < 1 for cosine in record["latents"]["row_cosine"])
        ranks, rows = record["latents"]["effective_rank"], record["latents"]["num_rows"]
        assert all(1 < rank <= count for rank, count in zip(ranks, rows, strict=True))


def evaluate(runs: Path, name: str, model: Path, output: Path) -> None:
    """`mirage evaluate` of an export of the run, in one process and with larger batches."""
    arguments = ["evaluate", "--model", model, "--task", task(runs, name)]
    arguments += ["--data", runs / "questions" / "questions.jsonl"]
    arguments += ["--output", output, "--latents", ARMS, "--max-new-tokens", MAX_NEW_TOKENS, "--batch-size", 4]
    arguments += ["--seed", 42]
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", RUNS)
def test_answers_are_those_of_the_exported_model(runs: Path, name: str) -> None:
    """Those of `mirage evaluate`, in one process and with larger batches, for the weights of the last checkpoint."""
    run_dir, export, output = runs / f"{name}-True", runs / f"{name}-export", runs / f"{name}.jsonl"
    export_checkpoint(run_dir, export)
    evaluate(runs, name, export, output)
    ours, theirs = (records(path) for path in (run_dir / "evaluations" / f"step_{STEPS}.jsonl", output))
    told = ("number", "arm", "text", "num_tokens", "num_blocks", "num_latents", "num_replaced", "complete", "scores")
    assert [{field: answer[field] for field in told} for answer in ours] == [
        {field: answer[field] for field in told} for answer in theirs
    ]
    rows = [
        json.loads(Path(f"{path}.summary.json").read_text())["settings"]["rows"]
        for path in (run_dir / "evaluations" / f"step_{STEPS}.jsonl", output)
    ]
    assert rows[0] == rows[1], "`mirage compare` takes them for other rows"
    own = [answer for answer in ours if answer["arm"] == "own"]
    assert len(own) == NUM_ROWS
    assert {answer["num_blocks"] > 0 for answer in own} == {True, False}
    assert len({answer["num_tokens"] for answer in own}) > 3  # so that ranks end at different times


def test_a_run_that_hides_images_hides_them_in_its_evaluation(runs: Path) -> None:
    """The same weights answer otherwise where they see the images after a block."""
    export, output = runs / "seeing", runs / "seeing.jsonl"
    export_checkpoint(runs / f"{HIDDEN}-True", export)
    config = json.loads((export / "config.json").read_text())
    assert config["mirage"]["answer_sees_image"] is False
    config["mirage"]["answer_sees_image"] = True
    (export / "config.json").write_text(json.dumps(config))
    evaluate(runs, HIDDEN, export, output)
    hidden = records(runs / f"{HIDDEN}-True" / "evaluations" / f"step_{STEPS}.jsonl")
    differs = [ours["text"] != theirs["text"] for ours, theirs in zip(hidden, records(output), strict=True)]
    assert any(differs)
    assert not all(differs)  # rows without an image, or without a block


def test_the_memory_of_an_evaluation_is_tried_before_the_first_step(runs: Path) -> None:
    """In every run that evaluates, and in no other; that it changes no bit, the tests above say."""
    log = (runs / "log").read_text().splitlines()
    firsts = [line for line in log if line.startswith(("dry run: ", "step     1/"))]
    plain, evaluated = ["dry run: the costliest", "step     1/"], ["dry run: the costliest", "dry run: the longest"]
    expected = [*plain, *evaluated, plain[-1]] * len(RUNS)
    assert [line[: len(begin)] for line, begin in zip(firsts, expected, strict=True)] == expected
    assert sum("(questions: 2, columns: " in line for line in firsts) == len(RUNS)


def test_rates_are_reported_after_each_evaluation(runs: Path) -> None:
    """evaluation.jsonl against the answers in the files."""
    run_dir = runs / f"{SCORED}-True"
    reported = records(run_dir / "evaluation.jsonl")
    assert [record["step"] for record in reported] == [INTERVAL, STEPS]
    for record in reported:
        answers = records(run_dir / "evaluations" / f"step_{record['step']}.jsonl")
        for arm, suffix in (("own", ""), ("zeroed", "_zeroed")):
            of_arm = [answer for answer in answers if answer["arm"] == arm]
            cut_off = sum(answer["num_tokens"] == MAX_NEW_TOKENS and not answer["complete"] for answer in of_arm)
            assert record[f"cut_off{suffix}"] == pytest.approx(cut_off / NUM_ROWS)
            right = sum((len(answer["text"]) + answer["row"]["id"]) % 3 == 0 for answer in of_arm)
            assert 0 < right < NUM_ROWS
            assert record[f"success{suffix}"] == pytest.approx(right / NUM_ROWS)
            blocks = sum(answer["num_blocks"] > 0 for answer in of_arm)
            assert record[f"with_blocks{suffix}"] == pytest.approx(blocks / NUM_ROWS)
    assert not list((run_dir / "evaluations").glob("*.parts"))


def test_tensorboard_shows_answers_and_the_configuration(runs: Path) -> None:
    run_dir = runs / "stage2-untied-True"
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    for number in range(3):
        assert [event.step for event in events.Images(f"evaluation/answer_{number}")] == [INTERVAL, STEPS]
    (shown,) = [event for event in events.Tensors("evaluation/answer_0/text_summary") if event.step == STEPS]
    first = records(run_dir / "evaluations" / f"step_{STEPS}.jsonl")[0]
    text = shown.tensor_proto.string_val[0].decode()
    assert "**question**: " in text
    assert text.count(LATENT_MARK) == first["num_latents"]
    (described,) = events.Tensors("configuration/text_summary")
    assert '"latent_size": 4' in described.tensor_proto.string_val[0].decode()
    assert "latents/row_cosine_0" in events.Tags()["scalars"]
