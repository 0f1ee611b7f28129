"""End to end on real input: both stages learn the reference's ten rows by heart; decoding uses latents."""

import os
from pathlib import Path

import launching
import pytest
from typer.testing import CliRunner

from data_tools.build import build
from mirage_ds.cli import app
from mirage_ds.evaluation.finished import read_results
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny

ROOT = Path(__file__).parents[2]
LATENT_SIZE, MAX_PIXELS = 4, 28 * 28 * 16
STEPS = {"stage1": 75, "stage2": 40}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(
        "MIRAGE_VSP_DIR" not in os.environ,
        reason="MIRAGE_VSP_DIR does not name the reference's own rows, which have no licence to be shipped",
    ),
]


def train(folder: Path, stage: str, *more: str) -> None:
    arguments = [
        str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml"),
        f"train.stage={stage}",
        f"run.dir={folder / stage}",
        f"model.path={folder / 'model'}",
        "model.activation_checkpointing=none",
        f"data.shards={folder / 'shards'}",
        f"data.max_pixels={MAX_PIXELS}",
        f"train.max_steps={STEPS[stage]}",
        "train.micro_batch_size_per_gpu=5",
        "train.gradient_accumulation_steps=1",
        "train.warmup_steps=10",
        "train.lr=1e-3",
        "train.ce_loss_weight=1",
        "train.log_freq=10",
        *more,
    ]
    with launching.start(2, *arguments, log=folder / f"{stage}.log") as ranks:
        ranks.finish(timeout_s=1500)


# Of a random model, whose own embeddings and matrices say nothing.
LORA = ["model.lora.rank=32", "model.lora.alpha=64", "model.lora.train_embeddings=all", "train.lr=4e-3"]


@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_ten_real_rows_are_learnt_and_answered(tmp_path: Path, more: list[str]) -> None:
    rows = Path(os.environ["MIRAGE_VSP_DIR"]) / "sample" / "sample.jsonl"
    write_tiny(rows, tmp_path / "model", seed=0)
    build(rows, tmp_path / "shards", maxcount=100, maxsize=10**9)
    train(tmp_path, "stage1", *more)
    train(tmp_path, "stage2", f"run.init_from={tmp_path / 'stage1'}", *more)

    export_checkpoint(tmp_path / "stage2", tmp_path / "trained", form="merge" if more else None)
    options = {"model": "trained", "output": "answers.jsonl", "task": "vsp-spatial-reasoning"}
    options |= {name: str(tmp_path / options[name]) for name in ("model", "output")}
    options |= {"data": str(rows), "batch-size": "10", "max-new-tokens": "600"}
    done = CliRunner().invoke(
        app, ["evaluate", *(word for name, value in options.items() for word in (f"--{name}", value))]
    )
    assert done.exit_code == 0, done.output
    answers = read_results(tmp_path / "answers.jsonl")["own"]
    assert [answer.num_latents for answer in answers] == [LATENT_SIZE] * 10
    wrong = [(answer.where, answer.text) for answer in answers if not answer.scores["exact"].success]
    assert not wrong
