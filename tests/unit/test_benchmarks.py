"""The training benchmark: what it compares is equal, and every line that a GPU will run has run on the CPU."""

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import batching
import cost_table
import data_stream
import launching
import measuring
import numpy as np
import plain_loop
import pytest
import torch
import train_shapes
import train_step
from reference_step import reference_loss

from benchmarks import looking_cost

CPU = torch.device("cpu")
VOCAB = 320


@pytest.fixture(scope="module")
def hf() -> Any:
    return train_shapes.make_hf(train_shapes.tiny(2, VOCAB), dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_the_restated_step_is_the_plain_loop(hf: Any, stage: str) -> None:
    """Loss and gradients of the step that ours is compared with, against a loop that shares nothing with either."""
    row = train_shapes.make_row(1, cost_table.SMALL_SHAPE, VOCAB, stage)
    sample = vars(row)
    assert torch.equal(plain_loop.positions(hf, sample)[:, 0], row.position_ids)

    def plain() -> torch.Tensor:
        ce_loss, latent_loss = plain_loop.sample_losses(hf, sample, stage)
        return 0.1 * ce_loss + latent_loss

    expected, theirs = cost_table.loss_and_gradients(hf, plain)
    loss, gradients = cost_table.loss_and_gradients(hf, lambda: reference_loss(hf, row, stage, 0.1))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert gradients.keys() == theirs.keys()
    for name, gradient in gradients.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * theirs[name].norm(), name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_benchmark_compares_equal_steps(hf: Any, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, stored and recomputed, has the loss and gradients of the restated step; another loss is noticed."""
    row = train_shapes.make_row(2, cost_table.SMALL_SHAPE, VOCAB, stage)
    cost_table.check_equal(hf, stage, row)
    monkeypatch.setattr(cost_table, "reference_loss", lambda *arguments: 1.0001 * reference_loss(*arguments))
    with pytest.raises(AssertionError, match=f"{stage}: loss"):
        cost_table.check_equal(hf, stage, row)


def test_rows_have_their_shape() -> None:
    shape = cost_table.SHAPE
    row = train_shapes.make_row(3, shape, VOCAB, "stage1")
    assert (len(row.input_ids), len(row.pixel_values), len(row.pixel_values_latent)) == (502, 1296, 1296)
    assert (int(row.image_mask.sum()), int((row.labels >= 0).sum()), int(row.latent_mask.sum())) == (324, 60, 4)
    with pytest.raises(ValueError, match="no room"):
        train_shapes.make_row(3, train_shapes.RowShape((18, 18), 380, 60, 4), VOCAB, "stage1")


def run(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> Any:
    """Runs the command; what it wrote."""
    threads = str(torch.get_num_threads())
    words = ["train_step.py", "--small", "--runs", "1", "--threads", threads, "--json", str(path), *arguments]
    monkeypatch.setattr(sys, "argv", words)
    train_step.main()
    return json.loads(path.read_text())


def test_the_cost_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run(monkeypatch, tmp_path / "cost.json", "--micro-batch", "1,2", "--only", "stage2")
    assert {"torch", "git_commit"} <= set(written["environment"]["versions"])
    ways = [(each["way"], each["rows"]) for each in written["results"]]
    assert ways == [("stored", 1), ("reference", 1), ("recomputed", 1), ("stored", 2), ("recomputed", 2)]
    reference_s = written["results"][1]["row_s"]
    for each in written["results"]:
        assert each["row_s"] == each["steps"][0]["seconds"] / each["rows"]
        assert each["speedup"] == reference_s / each["row_s"]
        assert each["of_floor"] == pytest.approx(each["flops_per_row"] / each["product_flops"] / each["row_s"])
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| stage2")]
    assert [(cells[2], int(cells[3])) for cells in table] == ways


def test_the_cases_of_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """On the CPU and tiny: both depths of each case, and losses in bf16 near those in float32."""
    arguments = ["--cases", "seven-b", "--micro-batch", "2", "--only", "stage1,stage2"]
    results = run(monkeypatch, tmp_path / "7b.json", *arguments)["results"]
    cases = [(each["stage"], each["latent_size"], each["recompute"], each["varying"]) for each in results["steps"]]
    assert len(cases) == 32
    assert cases[:16] == cases[16:]
    assert len(set(cases)) == 16
    assert all(each["ms"] > 0 and each["planned_bytes"] > 0 for each in results["steps"])
    for each in results["losses"]:
        assert each["sdpa"] == pytest.approx(each["float32"], rel=1e-2)
    assert capsys.readouterr().out.count("| sdpa | stage2 | 8 |") == 4


def test_the_ways_to_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, threads = tmp_path / "batching.json", str(torch.get_num_threads())
    words = ["--small", "--runs", "1", "--samples", "32", "--threads", threads, "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["batching.py", *words])
    batching.main()
    results = {(each["stage"], each["way"]): each for each in json.loads(path.read_text())["results"]}
    assert [*results] == [(stage, way) for stage, ways in batching.WAYS.items() for way in ways]
    tokens = sum(batching.draw_lengths(32, batching.SMALL_SCALE))
    for (stage, _), each in results.items():
        seconds, in_order_s = (found["steps"][0]["seconds"] for found in (each, results[stage, "in order"]))
        assert each["tokens_per_s"] == tokens / seconds
        assert each["speedup"] == in_order_s / seconds
    padding = [results["stage1", way]["padding"] for way in ("in order", "balanced", "packed")]
    assert padding[0] > 0.3 > padding[1] > padding[2] == 0
    assert results["stage2", "in order"]["padding"] > results["stage2", "balanced"]["padding"]
    table = capsys.readouterr().out
    assert (table.count("\n| stage1 |"), table.count("\n| stage2 |")) == (3, 2)


def test_the_cost_of_images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "images.json"
    monkeypatch.setattr(sys, "argv", ["data_stream.py", "--small", "--runs", "1", "--json", str(path)])
    data_stream.main()
    results = json.loads(path.read_text())["results"]
    assert [each["kind"] for each in results] == list(data_stream.KINDS)
    for each in results:
        assert each["smaller"] == 8
        assert each["ratios"]["worker / decode"] == each["ms"]["worker"] / each["ms"]["decode"]
        assert ("cost" in each["missed"]) == (each["ms"]["worker"] > 3 * each["ms"]["decode"])
        assert ("rate" in each["missed"]) == (each["ms"]["processor"] < 3 * each["ms"]["worker"])
    assert capsys.readouterr().out.count("| 1/8 |") == len(results)


def test_the_cost_of_images_compares_equal_values() -> None:
    """A value that differs by a rounding is noticed."""
    patches, levels = torch.arange(588).view(1, -1).byte(), torch.randn(3, 256)
    values = torch.stack([levels[place % 3][patches[0, place].long()] for place in range(588)])
    theirs = {"pixel_values": values.view(1, 1, 196, 3).expand(-1, 2, -1, -1).permute(0, 3, 1, 2).flatten(1).clone()}
    ways = {"worker": lambda: (patches, None), "processor": lambda: theirs}
    assert data_stream.compare(ways, levels) == 8
    theirs["pixel_values"][0, -1] *= 1 + 2e-7
    with pytest.raises(AssertionError, match="other values"):
        data_stream.compare(ways, levels)


def test_batching_compares_equal_losses() -> None:
    with pytest.raises(AssertionError, match=r"packed: loss 1\.0001"):
        batching.check_equal({"in order": 1.0, "balanced": 1.0, "packed": 1.0001})


def test_lengths_are_drawn_as_published_rows_have_them() -> None:
    lengths = np.array(batching.draw_lengths(20000, 1))
    assert (lengths.min(), lengths.max()) == (batching.SHORTEST, batching.LONGEST)
    assert np.median(lengths) == pytest.approx(batching.MIDDLE, rel=0.03)


def test_waits_for_the_gpu_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch warns of them, also when the same line of the model waits again; the mode is reset after a failure."""
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def step() -> None:
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("of something else", stacklevel=1)

    assert measuring.host_syncs(step, torch.device("cuda")) == 3
    with pytest.raises(ZeroDivisionError):
        measuring.host_syncs(lambda: 1 / 0, torch.device("cuda"))
    assert modes == ["warn", "default"] * 2


def test_calls_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their number and the clock's difference, also of one that fails; afterwards nothing is watched."""
    clock = iter([1.0, 1.5, 7.0, 7.25])
    monkeypatch.setattr(looking_cost.time, "process_time", lambda: next(clock))
    spent = looking_cost.Spent()
    with looking_cost.watched(Path, "read_text", spent):
        with pytest.raises(FileNotFoundError):
            Path("there is none").read_text()
        assert "benchmarks" in Path(looking_cost.__file__).read_text()
    assert (spent.calls, spent.seconds) == (2, 0.75)
    Path(looking_cost.__file__).read_text()
    assert spent.calls == 2


def test_builds_are_measured(tmp_path: Path) -> None:
    """All processes of a build count: with two, those of the workers too."""
    script = Path(looking_cost.__file__).with_name("build.py")
    words = ["--rows", "40", "--pixels", "300", "--repeats", "1", "--folder", str(tmp_path)]
    command = [sys.executable, str(script), *words, "--json", str(tmp_path / "build.json")]
    subprocess.run(command, check=True, env=launching.environment())
    medians = json.loads((tmp_path / "build.json").read_text())["medians"]
    assert medians["2"]["processor_s"] > 0.9 * medians["1"]["processor_s"] > 0.01
    assert medians["2"]["at_most"] == pytest.approx(2 * medians["1"]["processor_s"] / medians["2"]["processor_s"])
    assert [path.name for path in tmp_path.iterdir()] == ["build.json"]
