"""Both stages on a real cluster as on one machine, with both launchers; jobs that cannot run are refused."""

import shutil
from pathlib import Path

import launching
import pytest
from cluster import Cluster, wait_until
from markdown_blocks import ROOT, blocks
from runs import START_S, Ground, Run, mirage_launch, read, submit


def losses(run_dir: Path) -> list[float]:
    records = read(run_dir / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 21))
    return [record["loss"] for record in records]


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_trains_as_on_one_machine(cluster: Cluster, drawn_job: Path, stage: str) -> None:
    """The README's main job, from shards to stage 2, with the ranks on two nodes instead of one machine.

    A second job of the same run is refused meanwhile.
    """
    recipe = f"launch/recipes/tiny-{stage}.yaml"
    run = submit(cluster, drawn_job, recipe, "train.max_steps=20", f"run.dir=runs/slurm-{stage}")
    again = ("slurm", "--nodes", "2", "--ranks-per-node", "1", recipe, f"run.dir=runs/slurm-{stage}")
    assert f"{run.number} is " in mirage_launch(cluster, drawn_job, *again, code=2).stderr
    run.wait_for_end()
    assert losses(run.dir) == pytest.approx(losses(drawn_job / "runs" / f"tiny-{stage}"), rel=1e-5)
    (attempt,) = run.attempts
    assert (attempt["outcome"], attempt["nodes"]) == ("finished", cluster.nodes[:2])


@pytest.mark.slow
def test_deepspeed_s_own_launcher(cluster: Cluster, drawn_job: Path) -> None:
    """The commands of docs/cluster.md inside an allocation."""
    page = blocks(ROOT / "docs" / "cluster.md")
    (commands,) = [block.text for block in page if "deepspeed --launcher" in block.text]
    commands = commands.replace("=8", "=1").replace("mirage_ds/train.py", str(ROOT / "mirage_ds" / "train.py"))
    commands = commands.replace("RECIPE", "launch/recipes/tiny-stage1.yaml run.dir=runs/deepspeed")
    script, log = drawn_job / "deepspeed.sh", drawn_job / "deepspeed.log"
    script.write_text(f"#!/bin/bash -e\nexport DS_ACCELERATOR=cpu\n{commands}")
    options = ("--parsable", "--nodes=2", "--ntasks-per-node=1", f"--output={log}")
    environment = launching.environment()
    number = cluster.run("sbatch", *options, str(script), environment=environment, cwd=drawn_job).stdout.strip()
    run = Run(cluster, drawn_job / "runs" / "deepspeed", number)
    wait_until(lambda: run.over, "the end", START_S, lambda: str(run.job))
    assert run.job["JobState"] == "COMPLETED", log.read_text()
    assert losses(drawn_job / "runs" / "deepspeed") == pytest.approx(
        losses(drawn_job / "runs" / "tiny-stage1"), rel=1e-5
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--nodes", "2", "--partition", "nope"), "no such partition (--partition nope); allowed: batch (3 nodes)"),
        (("--nodes", "4"), "too few nodes (--nodes 4, partition batch with 3)"),
        (("--nodes", "3", "train.global_batch_size=4"), "train.global_batch_size=6, or change the number of ranks"),
    ],
)
def test_refused_before_the_job_starts(ground: Ground, options: tuple[str, ...], words: str) -> None:
    recipe = ground.recipe("stage1", "refused", "train.gradient_accumulation_steps=null")
    result = mirage_launch(ground.cluster, ground.folder, "slurm", "--ranks-per-node", "1", *recipe, *options, code=2)
    assert words in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (ground.folder / "refused").exists()


def test_shards_that_are_missing_on_a_node(ground: Ground) -> None:
    """Only the login machine has them, on its own disk: no rank starts, and the job is not requeued."""
    shutil.copytree(ground.folder / "shards", ground.cluster.local / "shards")
    run = ground.submit("stage1", "missing", f"data.shards={ground.cluster.local / 'shards'}")
    run.wait_for_end("FAILED")
    assert f"error: node {ground.cluster.nodes[0]}: " in run.log
    assert "no manifest.json" in run.log
    assert [attempt["outcome"] for attempt in run.attempts] == ["refused"]
    assert run.starts == 0
    assert "step     1/" not in run.log
