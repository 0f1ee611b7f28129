"""`mirage-launch slurm` on a real cluster: both stages train as on one machine, and what cannot run is refused."""

import pytest
from runs import Ground


def test_both_stages_train_as_on_one_machine(ground: Ground) -> None:
    losses = {}
    for stage in ("stage1", "stage2"):
        first = [f"run.init_from={ground.folder / 'slurm-stage1'}"] if stage == "stage2" else []
        run = ground.submit(stage, f"slurm-{stage}", "train.max_steps=20", *first)
        run.wait_for_end()
        expected = ground.local(stage, f"local-{stage}", "train.max_steps=20", *first)
        losses[stage] = [record["loss"] for record in run.records]
        assert [record["step"] for record in run.records] == list(range(1, 21))
        assert losses[stage] == pytest.approx([record["loss"] for record in expected], rel=1e-5)
        (attempt,) = run.attempts
        assert attempt["outcome"] == "finished"
        assert attempt["nodes"] == ground.cluster.nodes[:2]
