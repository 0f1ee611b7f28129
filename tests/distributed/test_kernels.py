"""Training with the Triton kernels, interpreted, against training with the torch path: 2 ranks, the same samples.

Run like tests/interpreted, by tests/unit/ops/test_interpreted.py: Triton reads the variable when it is imported, and
the process from which the ranks are forked has imported it.
"""

from pathlib import Path

import pytest
from cases import CUT_STEPS, all_cases, read_outcome, start_cases

CASES = ("stage1-varying-tied-2x1x2", "tower")
"""K from 2 to 8, different for every sample; and a trained tower on ragged samples, some without a helper image."""


def test_the_same_losses(
    models: dict[str, str],
    deepspeed_configs: dict[str, str],
    tmp_path: Path,
) -> None:
    """Every loss of every step, with and without a trained tower."""
    cases = [case for case in all_cases(models, deepspeed_configs)[2] if case["name"] in CASES]
    for interpret in ("0", "1"):
        (tmp_path / interpret).mkdir()
        with start_cases(2, cases, tmp_path / interpret, {"TRITON_INTERPRET": interpret}) as ranks:
            ranks.finish(timeout_s=1200)
    for name in CASES:
        plain, interpreted = (read_outcome(tmp_path / interpret, name) for interpret in ("0", "1"))
        assert plain.report["pooling"] == "latent_pool: plain torch on cpu"
        assert interpreted.report["pooling"].endswith("kernels on cpu, interpreted")
        assert len(plain.losses) == (5 if name == "tower" else CUT_STEPS)
        assert interpreted.losses == pytest.approx(plain.losses, rel=1e-6)
        norms = [[record["grad_norm"] for record in result.records] for result in (interpreted, plain)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
