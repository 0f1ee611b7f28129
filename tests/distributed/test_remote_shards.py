"""Training from a web server is training from a disk, bit for bit, also where the server is away for a while."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest
import torch
from generated_rows import write_rows

from data_tools.build import build
from mirage_ds.hf.preset import write_tiny

RECIPE = Path(__file__).parents[2] / "launch" / "recipes" / "tiny-stage1.yaml"
FILE_SERVER = Path(__file__).parents[1] / "file_server.py"
STEPS, ROWS = 20, 60  # of global batches of 2: less than an epoch, so that every sample is fetched


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, shards, and a run that read them from the disk."""
    folder = tmp_path_factory.mktemp("remote")
    rows = write_rows(folder / "rows", ROWS)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=8, maxsize=10**9)
    with launching.start(1, *command(folder, "disk", folder / "shards"), log=folder / "log") as ranks:
        ranks.finish(timeout_s=300)
    return folder


def command(ground: Path, name: str, shards: Path | str) -> list[str]:
    return [
        *(str(RECIPE), f"model.path={ground / 'model'}", f"run.dir={ground / name}", f"data.shards={shards}"),
        *(f"train.max_steps={STEPS}", "train.warmup_steps=1", "train.log_freq=1", "data.num_workers=2"),
        *("train.gradient_accumulation_steps=null", "train.global_batch_size=2", "train.deterministic=true"),
        *(f"data.cache_dir={ground / f'{name}-cache'}", "data.read_timeout_s=5"),
    ]


def serve(ground: Path, port: int) -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, str(FILE_SERVER), str(ground / "shards"), str(port)])
    while server.poll() is None:
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            break
        time.sleep(0.02)
    return server


def losses(run: Path) -> list[dict[str, float]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in each.items() if "loss" in name or name == "step"} for each in records]


def masters(run: Path) -> list[torch.Tensor]:
    file = run / "checkpoints" / f"global_step{STEPS}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    return torch.load(file, weights_only=False)["optimizer_state_dict"]["fp32_flat_groups"]


@pytest.mark.parametrize("is_killed", [False, True])
def test_training_from_a_server(ground: Path, tmp_path: Path, is_killed: bool) -> None:
    port = launching.free_port()
    name, servers = f"server-{is_killed}", [serve(ground, port)]
    run = ground / name
    try:
        with launching.start(1, *command(ground, name, f"http://127.0.0.1:{port}"), log=tmp_path / "log") as ranks:
            while is_killed and ranks.code is None and "step" not in log_of(run):
                time.sleep(0.02)
            if is_killed:
                servers[0].kill()
                servers[0].wait()
                end_s = time.monotonic() + 60
                while "WARNING: try 1 of 6 to read" not in ranks.log.read_text() and time.monotonic() < end_s:
                    time.sleep(0.05)
                servers.append(serve(ground, port))
            text = ranks.finish(timeout_s=300)
    finally:
        for server in servers:
            server.kill()
            server.wait()
    assert ("WARNING: try 1 of 6 to read" in text) == is_killed
    expected = losses(ground / "disk")
    assert len(expected) == STEPS
    assert losses(run) == expected
    for ours, theirs in zip(masters(run), masters(ground / "disk"), strict=True):
        assert torch.equal(ours, theirs)


def log_of(run: Path) -> str:
    metrics = run / "metrics.jsonl"
    return metrics.read_text() if metrics.exists() else ""
