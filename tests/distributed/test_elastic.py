"""A run resumes with another number of ranks: 2, 1, 4, 2 against an uninterrupted run on 2.

Several sub-groups, two parameter groups, and a frozen tower trained by another run, so not that of the model folder.
Rows get other rows' helper images, and a share of them has hidden images.
"""

import json
import signal
import time
from pathlib import Path
from typing import Any

import launching
import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.checkpoint.find import find_named
from mirage_ds.checkpoint.partitions import stored_parameters
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone

ROOT = Path(__file__).parents[2]
STEPS, LEG = 28, 5
RANKS = (2, 1, 4, 2)

pytestmark = pytest.mark.slow


def records(run_dir: Path) -> list[dict[str, Any]]:
    metrics = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def last_step(run_dir: Path) -> int:
    return max((record["step"] for record in records(run_dir)), default=0)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards, a DeepSpeed configuration with small sub-groups, and a run `base` that trained the tower."""
    folder = tmp_path_factory.mktemp("elastic")
    rows = write_rows(folder / "rows", 10)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    settings = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    settings["zero_optimization"]["sub_group_size"] = 100_000
    (folder / "zero3.json").write_text(json.dumps(settings))
    run(folder, "base", 2, "train.max_steps=4", "model.train_tower=true")
    return folder


def start(ground: Path, name: str, ranks: int, *more: str) -> launching.Ranks:
    command = [str(ROOT / "launch" / "recipes" / "tiny-stage1.yaml")]
    command += [f"model.path={ground / 'model'}", f"data.shards={ground / 'shards'}"]
    command += [f"run.dir={ground / name}", "run.resume=auto", f"train.max_steps={STEPS}", "data.num_workers=0"]
    command += ["train.global_batch_size=4", "train.gradient_accumulation_steps=null", "checkpoint.keep_latest_k=9"]
    command += ["data.helper=shuffled", "data.text_dropout_image=0.3"]
    command += [f"distributed.deepspeed_config={ground / 'zero3.json'}", *more]
    return launching.start(ranks, *command, log=ground / f"{name}.log")


def run(ground: Path, name: str, ranks: int, *more: str, until: int | None = None) -> str:
    """Runs to the end, or to SIGTERM after step `until`; returns the output."""
    with start(ground, name, ranks, *more) as run:
        deadline_s = time.monotonic() + 600
        while run.code is None and until is not None:
            assert time.monotonic() < deadline_s, run.log.read_text()[-4000:]
            if last_step(ground / name) >= until:
                run.send_signal(signal.SIGTERM)
                until = None
            time.sleep(0.05)
        return run.finish(timeout_s=600)


def weights(run_dir: Path, ranks: int) -> dict[str, torch.Tensor]:
    stored = stored_parameters(find_named(run_dir), ranks)
    return {name: parameter.read() for name, parameter in stored.items()}


@pytest.fixture(scope="module")
def chain(ground: Path) -> list[int]:
    """The runs `whole`, with micro-batches of 1, and `chain`, whose starts choose their own; the first steps of the
    chain's second, third and fourth start."""
    first_weights, auto = f"run.init_from={ground / 'base'}", "train.micro_batch_size_per_gpu=auto"
    run(ground, "whole", 2, first_weights)
    begins = []
    for number, ranks in enumerate(RANKS):
        begins.append(last_step(ground / "chain") + 1)
        last = number == len(RANKS) - 1
        text = run(ground, "chain", ranks, first_weights, auto, until=None if last else begins[-1] + LEG - 1)
        assert f"micro-batch {4 // ranks} (auto: a rank has {4 // ranks} in each step; " in text
        if number:
            before = RANKS[number - 1]
            sizes = f"train.micro_batch_size_per_gpu: {4 // before} -> {4 // ranks}"
            assert f"changed since the last start: {sizes}; ranks: {before} -> {ranks}" in text
            assert f"Resuming from {ground / 'chain'}/checkpoints/global_step{begins[-1] - 1}" in text
    return begins[1:]


def test_same_samples_and_losses_on_any_number_of_ranks(ground: Path, chain: list[int]) -> None:
    expected, got = records(ground / "whole"), records(ground / "chain")
    assert [record["step"] for record in got] == list(range(1, STEPS + 1))
    assert [record["position"] for record in got] == [record["position"] for record in expected]
    assert [record["lr"] for record in got] == [record["lr"] for record in expected]
    for ours, reference in zip(got, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert ours[name] == pytest.approx(reference[name], rel=1e-4), (name, ours["step"])
    # Each number of ranks deals the same global batches otherwise.
    assert [record["imbalance"] for record in got] != [record["imbalance"] for record in expected]
    ends = [*(begin - 1 for begin in chain[1:]), STEPS]
    assert all(end - begin + 1 >= LEG for begin, end in zip(chain, ends, strict=True))


def test_the_frozen_tower_is_the_run_s_own(ground: Path, chain: list[int]) -> None:
    base, last = weights(ground / "base", 2), weights(ground / "chain", RANKS[-1])
    model = weights_of_folder(ground / "model")
    towers = [name for name in base if "visual" in name]
    assert towers
    for name in towers:
        assert torch.equal(last[name], base[name]), name
    assert any(not torch.equal(base[name], model[name]) for name in towers)


def weights_of_folder(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_backbone(str(folder), dtype=torch.float32).hf.named_parameters())


def test_the_final_state_of_the_optimizer(ground: Path, chain: list[int]) -> None:
    """Each group has its weight decay, each sub-group the run's step and moments like the uninterrupted run's."""
    states = {}
    for name in ("whole", "chain"):
        (file,) = find_named(ground / name).glob("*zero_pp_rank_0_mp_rank_00_optim_states.pt")
        states[name] = torch.load(file, weights_only=False)["optimizer_state_dict"]["optimizer_state_dict"]
    whole, chained = states["whole"], states["chain"]
    assert [group["weight_decay"] for group in chained["param_groups"]] == [0.01, 0.0]
    assert len(chained["state"]) > 2
    for number, state in whole["state"].items():
        assert chained["state"][number]["step"].item() == state["step"].item() == STEPS
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(chained["state"][number][key], state[key], rtol=1e-2, atol=1e-5)


def test_another_global_batch_is_refused(ground: Path, chain: list[int]) -> None:
    with start(ground, "chain", 1, "train.global_batch_size=8") as refused:
        assert refused.wait(timeout_s=600) == 2
    assert "global_batch_size: 4 -> 8" in refused.log.read_text()
    assert "train.global_batch_size=4 keeps the global batch with any number of ranks" in refused.log.read_text()
