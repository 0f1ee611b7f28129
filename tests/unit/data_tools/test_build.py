"""`mirage-data build`: plain webdataset reads back the rows bit for bit; every bad row is reported."""

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from generated_rows import image_bytes, make_row, write_jsonl, write_rows

from data_tools import cli
from data_tools.build import build
from mirage_ds.data.index import load_index
from mirage_ds.data.shard_samples import parse_members
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError

VSP_DIR = os.environ.get("MIRAGE_VSP_DIR", "")


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def image_paths(row: dict[str, Any], name: str) -> list[str]:
    value = row.get(name, [])
    return [value] if isinstance(value, str) else value


def assert_webdataset_reads(rows: Path, shards: Path) -> None:
    """Plain webdataset, without decoders, against the JSONL and the image files alone."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [sample["__key__"] for sample in samples] == [f"{number:09d}" for number in range(len(lines))]
    for row, sample in zip(lines, samples, strict=True):
        fields = {name: value for name, value in row.items() if name not in ("image_input", "image_output")}
        members = {}
        for kind, name in (("input", "image_input"), ("helper", "image_output")):
            for number, path in enumerate(image_paths(row, name)):
                members[f"{kind}_{number}{Path(path).suffix}"] = (rows.parent / path).read_bytes()
        assert json.loads(sample.pop("json")) == fields
        assert {name: data for name, data in sample.items() if not name.startswith("__")} == members


def test_generated_rows_are_read_back_by_webdataset(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    manifest, rejects = build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    assert rejects == []
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    assert_webdataset_reads(rows, tmp_path / "shards")


@pytest.mark.skipif(not VSP_DIR, reason="MIRAGE_VSP_DIR is not set: the reference's rows are not available")
def test_real_rows_are_read_back_by_webdataset(tmp_path: Path) -> None:
    rows = Path(VSP_DIR) / "sample" / "sample.jsonl"
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    assert_webdataset_reads(rows, tmp_path / "shards")
    assert SampleReader(load_manifest(tmp_path / "shards"))(9).input_images


def test_several_images_of_several_formats(tmp_path: Path) -> None:
    names = ["a.png", "b.jpg", "c.webp", "d.bmp", "e.gif", *(f"{number}.png" for number in range(7))]
    formats = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP", ".bmp": "BMP", ".gif": "GIF"}
    for seed, name in enumerate(names):
        (tmp_path / name).write_bytes(image_bytes(seed=seed, image_format=formats[Path(name).suffix]))
    rows = write_jsonl(
        tmp_path / "rows.jsonl",
        [
            {"text_input": "All in front", "text_output": "A", "image_input": names},
            {"text_input": "None", "text_output": "\u5730\u56fe"},
            {"text_input": "Q", "text_output": "<output_image><output_image>", "image_output": names[:2]},
            {"text_input": "Q", "text_output": "<output_image>, <output_image>", "image_output": names[:2]}
            | {"latent_size": [2, 8]},
        ],
    )
    build(rows, tmp_path / "shards", maxcount=10, maxsize=10**9)
    assert_webdataset_reads(rows, tmp_path / "shards")
    shards = load_manifest(tmp_path / "shards")
    assert len(SampleReader(shards)(0).input_images) == 12
    assert [SampleReader(shards)(number).latent_sizes for number in (2, 3)] == [(), (2, 8)]
    index = load_index(shards)
    assert [entry.latent_sizes for entry in index] == [None, None, None, [2, 8]]
    assert [entry.block_sizes(4) for entry in index] == [[], [], [4, 4], [2, 8]]


def test_the_extension_follows_the_content(tmp_path: Path) -> None:
    (tmp_path / "wrong.png").write_bytes(image_bytes(image_format="JPEG"))
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "Q", "text_output": "A", "image_input": "wrong.png"}])
    build(rows, tmp_path / "shards", maxcount=10, maxsize=10**9)
    with tarfile.open(tmp_path / "shards" / "shard-000000.tar") as tar:
        assert tar.getnames() == ["000000000.input_0.jpg", "000000000.json"]


def test_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    build(rows, tmp_path / "one", maxcount=4, maxsize=10**9)
    os.utime(tmp_path / "rows" / "images" / "0_0.png", (0, 0))
    build(rows, tmp_path / "100%d two", maxcount=4, maxsize=10**9)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "100%d two")


def test_maxsize_starts_new_shards(tmp_path: Path) -> None:
    manifest, _ = build(write_rows(tmp_path / "rows"), tmp_path / "shards", maxcount=10, maxsize=1)
    assert [shard.samples for shard in manifest.shards] == [1] * 10


def test_the_index_has_positions_and_facts(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9)
    folder = load_manifest(tmp_path / "shards")
    for number, entry in enumerate(load_index(folder)):
        row = make_row(number)
        assert entry.input_sizes == [(84 + 28 * (number % 3), 84)]
        assert entry.helper_sizes == [(84 + 28 * (number % 3), 91)]
        assert (entry.question_chars, entry.answer_chars) == (len(row["text_input"]), len(row["text_output"]))
        assert (entry.image_blocks, entry.latent_blocks) == (1, 1)
        shard = (folder.path / folder.manifest.shards[entry.shard].name).read_bytes()
        members = parse_members(shard[entry.offset : entry.offset + entry.size], entry.key, "here")
        assert sorted(members) == ["helper_0.png", "input_0.png", "json"]


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: (rows.parent / "images" / "1_0.png").unlink(), "image_input cannot be read: 'images/1_0.png'"),
        (lambda rows: cut_off(rows.parent / "images" / "1_0.png"), "the image cannot be decoded: .*, image_input 0"),
        (lambda rows: cut_off(rows.parent / "images" / "1_1.png"), "the image cannot be decoded: .*, image_output 0"),
        (lambda rows: rows.write_text(rows.read_text().replace("row-1", 'row-1"')), "malformed JSON"),
        (lambda rows: rows.write_text(rows.read_text().replace("LEFT x 1", "<image>")), "image slots in text_input: 2"),
        (lambda rows: rows.write_text(""), "no rows"),
    ],
)
def test_a_bad_row_is_reported_and_nothing_written(tmp_path: Path, spoil: Callable[[Path], Any], message: str) -> None:
    rows = write_rows(tmp_path / "rows")
    spoil(rows)
    with pytest.raises(DataError, match=message) as error:
        build(rows, tmp_path / "out" / "shards", maxcount=4, maxsize=10**9)
    assert f"{rows}:2" in str(error.value) or message == "no rows"
    assert list((tmp_path / "out").iterdir()) == []


def spoiled_rows(folder: Path) -> Path:
    """10 rows, of which 4 cannot be used, each for a different reason."""
    rows = write_rows(folder)
    cut_off(folder / "images" / "1_1.png")
    (folder / "images" / "4_0.png").unlink()
    lines = rows.read_text().splitlines()
    lines[6] = "{"
    lines[8] = lines[8].replace("<output_image>", "<output_image><output_image>")
    rows.write_text("".join(line + "\n" for line in lines))
    return rows


def test_bad_rows_are_rejected_listed_and_counted(tmp_path: Path) -> None:
    rows = spoiled_rows(tmp_path / "rows")
    manifest, rejects = build(rows, tmp_path / "shards", maxcount=4, maxsize=10**9, max_rejects=4)
    assert manifest.num_samples == 6
    listed = [json.loads(line) for line in (tmp_path / "shards" / "rejects.jsonl").read_text().splitlines()]
    assert listed == rejects
    places = [(line["where"], line["id"]) for line in listed]
    assert places == [(f"{rows}:2", "row-1"), (f"{rows}:5", "row-4"), (f"{rows}:7", None), (f"{rows}:9", "row-8")]
    reasons = ["the image cannot be decoded", "image_input cannot be read", "malformed JSON", "slots in text_output: 2"]
    for line, reason in zip(listed, reasons, strict=True):
        assert reason in line["reason"]
    # Keys are row numbers, and the good rows are the same as without the bad ones.
    entries = load_index(load_manifest(tmp_path / "shards"))
    assert [entry.key for entry in entries] == [f"{number:09d}" for number in (0, 2, 3, 5, 7, 9)]
    reader = SampleReader(load_manifest(tmp_path / "shards"))
    assert [reader(place).extra["id"] for place in range(6)] == [f"row-{number}" for number in (0, 2, 3, 5, 7, 9)]


def test_one_bad_row_too_many_and_nothing_is_written(tmp_path: Path) -> None:
    rows = spoiled_rows(tmp_path / "rows")
    with pytest.raises(DataError, match=r"(?s)unusable rows: 4\n.*rows.jsonl:2.*rows.jsonl:9.*\(now 3\)") as error:
        build(rows, tmp_path / "out" / "shards", maxcount=4, maxsize=10**9, max_rejects=3)
    assert "more\n" not in str(error.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shards.unfinished"]
    manifest, _ = build(rows, tmp_path / "out" / "shards", maxcount=4, maxsize=10**9, max_rejects=4)
    assert manifest.num_samples == 6
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shards"]


def test_the_first_few_of_many_are_listed(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"text_input": "Q"}] * 12)
    with pytest.raises(DataError, match=r"(?s)unusable rows: 12\n.*rows.jsonl:5.*and 7 more\n") as error:
        build(rows, tmp_path / "out" / "shards", maxcount=4, maxsize=10**9)
    assert "rows.jsonl:6" not in str(error.value)
    with pytest.raises(DataError, match="no usable row"):
        build(rows, tmp_path / "out" / "shards", maxcount=4, maxsize=10**9, max_rejects=12)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_bad_rows_there_is_no_list_of_them(tmp_path: Path) -> None:
    build(write_rows(tmp_path / "rows"), tmp_path / "shards", maxcount=4, maxsize=10**9, max_rejects=9)
    assert not (tmp_path / "shards" / "rejects.jsonl").exists()


def run_cli(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["mirage-data", *map(str, arguments)])
    cli.main()


def test_the_command_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows")
    with pytest.raises(SystemExit) as exit_:
        run_cli(monkeypatch, "build", "--input", rows, "--output", tmp_path / "shards", "--maxcount", 4)
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("wrote 10 samples in 3 shards")
    assert load_manifest(tmp_path / "shards").num_samples == 10
    rows = spoiled_rows(tmp_path / "spoiled")
    for max_rejects, code in ((3, 2), (4, 0)):
        with pytest.raises(SystemExit) as exit_:
            run_cli(monkeypatch, "build", "--input", rows, "--output", tmp_path / "six", "--max-rejects", max_rejects)
        assert exit_.value.code == code
    assert f"rejected 4 rows: see {tmp_path / 'six' / 'rejects.jsonl'}" in capsys.readouterr().out


def test_a_user_error_is_one_message_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows")
    with pytest.raises(SystemExit) as exit_:
        run_cli(monkeypatch, "build", "--input", rows, "--output", tmp_path / "rows")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert f"the output already exists ({tmp_path / 'rows'})" in error
    assert "Traceback" not in error


def test_no_torch_at_import() -> None:
    code = "import sys, data_tools.cli, data_tools.build, data_tools.manifest; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
