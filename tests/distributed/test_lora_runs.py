"""Runs with LoRA, from start to export: what is saved, resumes on other ranks, stage 2 from stage 1's adapter.

tests/distributed/test_lora_training.py has the losses and gradients, tests/unit/hf/test_adapter.py the exports.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from generated_rows import write_rows
from peft import PeftModel
from transformers import Qwen2_5_VLForConditionalGeneration

from data_tools.build import build
from launch.planner.estimate import checkpoint_bytes
from mirage_ds.hf.export import export_checkpoint
from mirage_ds.hf.preset import write_tiny
from mirage_ds.recipe import load_config
from mirage_ds.sizing.model_sizes import model_sizes

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
STEPS = 6
LORA = ["model.lora.rank=4", "model.lora.alpha=8"]


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    settings = [f"run.dir={folder / name}", f"model.path={folder / 'model'}", f"data.shards={folder / 'shards'}"]
    settings += ["data.num_workers=0", "train.global_batch_size=4", "train.gradient_accumulation_steps=null"]
    settings += [f"train.max_steps={STEPS}", "run.resume=auto", "checkpoint.interval=2", "checkpoint.keep_latest_k=9"]
    settings += ["evaluation.interval=3", f"evaluation.shards={folder / 'shards'}", "evaluation.max_samples=2"]
    settings += ["evaluation.task=none", f"evaluation.rows={folder / 'rows' / 'rows.jsonl'}", "evaluation.max_rows=2"]
    return [str(RECIPE), *settings, "evaluation.max_new_tokens=12", *LORA, *more]


def run(folder: Path, name: str, ranks: int, *more: str) -> str:
    log = folder / f"{name}-{ranks}.log"
    with launching.start(ranks, *arguments(folder, name, *more), log=log) as started:
        return started.finish(timeout_s=600)


def refused(folder: Path, name: str, *more: str) -> str:
    log = folder / f"{name}-refused.log"
    with launching.start(1, *arguments(folder, name, *more), log=log) as started:
        assert started.wait(timeout_s=600) == 2
    return log.read_text()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards, and the runs: `stage1` on 2 ranks; its copy `resumed`, from step 2 on, on 1; `stage2`."""
    folder = tmp_path_factory.mktemp("lora")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    run(folder, "stage1", 2)
    shutil.copytree(folder / "stage1", folder / "resumed")
    for step in (4, 6):
        shutil.rmtree(folder / "resumed" / "checkpoints" / f"global_step{step}")
    lines = (folder / "resumed" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "resumed" / "metrics.jsonl").write_text("".join(lines[:2]))
    run(folder, "resumed", 1)
    run(folder, "stage2", 2, "train.stage=stage2", f"run.init_from={folder / 'stage1'}")
    return folder


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_log_says_what_is_trained(ground: Path) -> None:
    text = (ground / "stage1-2.log").read_text()
    named = "as LoRA (rank 4, alpha 8, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj; embeddings: "
    assert f"M parameters trained {named}latent_rows), 1." in text


def test_a_resume_on_other_ranks_makes_the_same_steps(ground: Path) -> None:
    expected, found = records(ground / "stage1"), records(ground / "resumed")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm"):
        assert [each[name] for each in found] == pytest.approx([each[name] for each in expected], rel=1e-4), name


def test_a_checkpoint_holds_what_is_trained_alone(ground: Path) -> None:
    """So many bytes as the planner says, beside names, shapes and random states; none of them the base's."""
    config = load_config(RECIPE, arguments(ground, "stage1")[1:])
    planned = checkpoint_bytes(model_sizes(config.model), config)
    for tag in ("global_step2", "global_step6"):  # written in the background, and at the end
        files = list((ground / "stage1" / "checkpoints" / tag).iterdir())
        size = sum(file.stat().st_size for file in files if file.suffix == ".pt")
        assert 0 <= size - planned < 0.35 * planned + 100_000
        assert size < 0.4 * (ground / "model" / "model.safetensors").stat().st_size
    facts = json.loads((ground / "stage1" / "checkpoints" / "global_step2" / "run.json").read_text())
    assert facts["base"]["path"] == str(ground / "model")


def test_stage_2_starts_from_the_adapter_of_stage_1(ground: Path) -> None:
    """Its first loss is that of a model into which stage 1 was merged."""
    export_checkpoint(ground / "stage1", ground / "merged1", form="merge")
    merged = ["train.stage=stage2", f"model.path={ground / 'merged1'}", "train.max_steps=4", "model.lora=null"]
    plain = [each for each in arguments(ground, "from-merged", *merged) if "model.lora." not in each]
    with launching.start(1, *plain, log=ground / "from-merged.log") as started:
        started.finish(timeout_s=600)
    first = records(ground / "from-merged")[0]["loss"]
    assert records(ground / "stage2")[0]["loss"] == pytest.approx(first, rel=1e-5)
    fresh = records(ground / "stage1")
    assert fresh[-1]["loss"] < fresh[0]["loss"]


def test_exports_of_a_real_checkpoint(ground: Path) -> None:
    export_checkpoint(ground / "stage2", ground / "merged", form="merge")
    export_checkpoint(ground / "stage2", ground / "adapter", form="adapter")
    ids = torch.arange(3, 40)[None]
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(ground / "model").eval()
    merged = Qwen2_5_VLForConditionalGeneration.from_pretrained(ground / "merged").eval()
    with torch.no_grad():
        before, after = base(input_ids=ids).logits, merged(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, ground / "adapter").eval()(input_ids=ids).logits
    torch.testing.assert_close(adapted, after, rtol=0, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_refusals(ground: Path) -> None:
    """Another base, and another adapter, than those of the run that it would continue."""
    text = refused(ground, "other", f"run.init_from={ground / 'stage1'}", "model.lora.rank=8")
    assert "was trained with model.lora={'rank': 4" in text
    shutil.copytree(ground / "stage1", ground / "moved")
    shutil.rmtree(ground / "moved" / "checkpoints" / "global_step6")
    facts = ground / "moved" / "checkpoints" / "global_step4" / "run.json"
    assert "--merge" in text
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(ground / "model")
    model.model.language_model.layers[1].mlp.up_proj.weight.data[3, 4] += 0.25
    shutil.move(ground / "model" / "model.safetensors", ground / "kept")
    model.save_pretrained(ground / "model")
    try:
        text = refused(ground, "moved")
    finally:
        shutil.move(ground / "kept", ground / "model" / "model.safetensors")
    assert "the adapter was trained on other weights" in text
    assert facts.exists()
