"""`mirage-data stats` and `head`: against the rows themselves, read by plain json, Pillow and numpy."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from generated_rows import make_row, write_jsonl, write_rows
from rich.console import Console

from data_tools import cli
from data_tools.build import build
from data_tools.count import count
from data_tools.distribution import distribution
from data_tools.model_options import ModelOptions
from data_tools.stats import describe, stats
from mirage_ds.data.encode import load_encoder
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.hf.preset import write_tiny

NUM_ROWS, K = 9, 3


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Rows with one helper image, two of other K, and none."""
    rows = [make_row(number) for number in range(NUM_ROWS)]
    rows[3] |= {"text_output": "a<output_image>b<output_image>", "image_output": ["images/3_1.png", "images/4_1.png"]}
    rows[3]["latent_size"] = [2, 5]
    rows[4]["text_output"] = "none \x1b[31m red\nand a second line"
    del rows[4]["image_output"]
    return rows


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Path:
    place = tmp_path_factory.mktemp("stats")
    write_rows(place / "rows", NUM_ROWS)
    path = write_jsonl(place / "rows" / "rows.jsonl", rows)
    write_tiny(path, place / "model", seed=0)
    build(path, place / "shards", maxcount=4, maxsize=10**9)
    return place


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mirage-data", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_stats_are_those_of_the_rows_and_need_no_tar(
    place: Path,
    rows: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build(place / "rows" / "rows.jsonl", tmp_path / "shards", maxcount=4, maxsize=10**9)
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    run(monkeypatch, "stats", tmp_path / "shards", "--json")
    found = json.loads(capsys.readouterr().out)
    assert (found["num_rows"], found["num_shards"], found["model"], found["tokens"]) == (NUM_ROWS, 3, None, None)
    expected = {
        "question_chars": [len(row["text_input"]) for row in rows],
        "answer_chars": [len(row["text_output"]) for row in rows],
        "input_images": [1] * NUM_ROWS,
        "helper_images": [{3: 2, 4: 0}.get(number, 1) for number in range(NUM_ROWS)],
        "latent_blocks": [{3: 2, 4: 0}.get(number, 1) for number in range(NUM_ROWS)],
        "own_latent_size": [2, 5],
        "input_pixels": [(84 + 28 * (number % 3)) * 84 for number in range(NUM_ROWS)],
    }
    for name, values in expected.items():
        measure = found["measures"][name]
        assert (measure["count"], measure["total"]) == (len(values), sum(values)), name
        assert (measure["min"], measure["max"]) == (min(values), max(values))
        assert measure["quantiles"]["50%"] == np.quantile(values, 0.5, method="inverted_cdf")
        for bar in measure["histogram"]:
            assert bar["count"] == sum(bar["first"] <= value <= bar["last"] for value in values)
    assert found["sizes"]["input"] == {"84 x 84": 3, "112 x 84": 3, "140 x 84": 3}
    helpers = Counter(f"{84 + 28 * (number % 3)} x 91" for number in (0, 1, 2, 3, 4, 5, 6, 7, 8))
    assert found["sizes"]["helper"] == helpers  # image 4 belongs to row 3


def test_tokens_are_counted_where_they_were_and_else_estimated(place: Path) -> None:
    """The counted ones are the lengths of encoded samples."""
    options = ModelOptions(str(place / "model"), latent_size=K)
    assert stats(place / "shards", options).tokens == "estimated from characters"
    settings = {"system_turn": True, "min_pixels": None, "max_pixels": None, "max_length": None, "cache_dir": None}
    count(place / "shards", options.model, latent_size=K, **settings)
    found = stats(place / "shards", options)
    assert found.tokens == "counted"
    measures = {each.name: each.values for each in found.measures}
    read = SampleReader(load_manifest(place / "shards"))
    for stage, name in (("text", "tokens_text"), ("stage1", "tokens_latents"), ("stage2", "tokens_latents")):
        encoder = load_encoder(options.model, stage=stage, latent_size=K)
        encoded = [encoder(read(number)) for number in range(NUM_ROWS)]
        assert measures[name] == distribution(np.array([len(each.input_ids) for each in encoded]))
        if stage == "stage1":
            patches = [len(each.pixel_values_latent) for each in encoded]
            assert measures["helper_patches"] == distribution(np.array(patches))
            assert measures["input_patches"] == distribution(np.array([len(each.pixel_values) for each in encoded]))


@pytest.mark.parametrize("count", [1, 2, 9, 1000])
@pytest.mark.parametrize("high", [3, 50, 5000])
def test_quantiles_are_numpys_and_no_value_is_lost(count: int, high: int) -> None:
    values = np.random.default_rng(count).integers(0, high, count) ** 2
    found = distribution(values)
    assert found is not None
    for name, value in found.quantiles.items():
        assert value == np.quantile(values, float(name[:-1]) / 100, method="inverted_cdf")
    assert sum(bar.count for bar in found.histogram) == count
    edges = [edge for bar in found.histogram for edge in (bar.first, bar.last)]
    assert edges == sorted(edges)
    assert (edges[0], edges[-1]) == (values.min(), values.max())


@pytest.mark.parametrize("width", [42, 80, 160])
def test_the_table_fits_the_terminal(place: Path, rows: list[dict[str, Any]], width: int) -> None:
    """No number is cut off: the last column has the totals."""
    text = io.StringIO()
    Console(file=text, width=width).print(describe(stats(place / "shards")))
    assert max(map(len, text.getvalue().splitlines())) <= width
    totals = [line.split()[-1] for line in text.getvalue().splitlines() if line.strip()]
    assert str(sum(len(row["text_input"]) for row in rows)) in totals
    assert str(sum(len(row["text_output"]) for row in rows)) in totals
    assert "\u2026" not in text.getvalue()


def test_head_prints_rows(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Characters that would act on the terminal are escaped."""
    run(monkeypatch, "head", place / "shards", "-n", 5)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads[3] == (
        "000000003 (shard-000000.tar): input images 84 x 84; helper images 84 x 91, 112 x 91; latent blocks 2, K 2, 5"
    )
    assert heads[4] == "000000004 (shard-000001.tar): input images 112 x 84; helper images none; latent blocks 0"
    assert len(heads) == 5
    assert r"  answer:   none \x1b[31m red\nand a second line" in lines
    assert "  id: row-0" in lines
