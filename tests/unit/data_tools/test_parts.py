"""A build in parts, merged, against a single build of the same rows; parts that do not match are refused."""

import json
import sys
from pathlib import Path

import pytest
import webdataset
from generated_rows import write_rows

from data_tools import cli
from data_tools.build import build
from data_tools.check import check
from data_tools.parts import build_part, check_no_other_parts, describe_part, folder_of, merge, rows_of
from mirage_ds.errors import DataError

LARGE = 10**9


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def build_parts(rows: Path, output: Path, count: int, *, maxcount: int, maxsize: int = LARGE, max_rejects: int = 0):
    options = dict(count=count, maxcount=maxcount, maxsize=maxsize, max_rejects=max_rejects)
    return [build_part(rows, output, number=number, **options)[0] for number in range(count)]


def samples(shards: Path) -> list[dict[str, bytes]]:
    """As plain webdataset reads them."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    return [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]


def spoil(rows: Path, *numbers: int) -> None:
    lines = rows.read_text().splitlines()
    for number in numbers:
        lines[number] = "{"
    rows.write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize(("maxcount", "count"), [(1, 10), (2, 1), (2, 3), (3, 4), (5, 2)])
def test_merged_parts_are_the_single_build_byte_for_byte(tmp_path: Path, maxcount: int, count: int) -> None:
    rows = write_rows(tmp_path / "rows")
    build(rows, tmp_path / "single", maxcount=maxcount, maxsize=LARGE)
    parts = build_parts(rows, tmp_path / "merged", count, maxcount=maxcount)
    merge(parts[::-1], tmp_path / "merged")
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "single")


@pytest.mark.parametrize(("maxsize", "bad"), [(8000, ()), (LARGE, (3, 7)), (8000, (0, 9))])
def test_otherwise_the_samples_and_their_order_are_the_same(tmp_path: Path, maxsize: int, bad: tuple[int, ...]) -> None:
    rows = write_rows(tmp_path / "rows")
    spoil(rows, *bad)
    build(rows, tmp_path / "single", maxcount=3, maxsize=maxsize, max_rejects=2)
    parts = build_parts(rows, tmp_path / "merged", 2, maxcount=3, maxsize=maxsize, max_rejects=2)
    manifest, rejects = merge(parts, tmp_path / "merged", max_rejects=2)
    assert list(check(tmp_path / "merged")) == []
    assert samples(tmp_path / "merged") == samples(tmp_path / "single")
    assert manifest.num_samples == 10 - len(bad)
    assert [line["where"] for line in rejects] == [f"{rows}:{number + 1}" for number in bad]
    if bad:
        listed = [(folder / "rejects.jsonl").read_bytes() for folder in (tmp_path / "merged", tmp_path / "single")]
        assert listed[0] == listed[1]


@pytest.mark.parametrize(("num_rows", "count", "maxcount"), [(10, 3, 1), (10, 4, 3), (7, 7, 1), (1000, 7, 9)])
def test_every_row_is_in_one_part(tmp_path: Path, num_rows: int, count: int, maxcount: int) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n\n" * num_rows)  # empty lines are not rows
    ranges = [rows_of([rows], number, count, maxcount) for number in range(count)]
    assert [row for each in ranges for row in each] == list(range(num_rows))
    assert all(each.start % maxcount == 0 and len(each) for each in ranges)
    shards = [-(-len(each) // maxcount) for each in ranges]
    assert max(shards) - min(shards) <= 1


def test_rejects_count_over_all_parts(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    spoil(rows, 1, 8)
    parts = build_parts(rows, tmp_path / "out" / "merged", 2, maxcount=5, max_rejects=1)
    with pytest.raises(DataError, match=r"(?s)unusable rows: 2\n.*rows.jsonl:2.*rows.jsonl:9.*\(now 1\)"):
        merge(parts, tmp_path / "out" / "merged", max_rejects=1)
    assert sorted((tmp_path / "out").iterdir()) == parts


def test_parts_that_are_not_one_build(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    first, second = build_parts(rows, tmp_path / "a", 2, maxcount=2)
    other, _ = build_parts(rows, tmp_path / "b", 2, maxcount=1)
    build(rows, tmp_path / "single", maxcount=2, maxsize=LARGE)
    wrong = [
        ([first], "part 1 is missing"),
        ([first, second, folder_of(tmp_path / "c", 0, 2)], "not a part of a build: .*c.part-00000-of-00002"),
        ([first, tmp_path / "single"], "not a part of a build: .*single"),
        ([other, second], "parts of different builds"),
    ]
    for folders, message in wrong:
        with pytest.raises(DataError, match=message):
            merge(folders, tmp_path / "out" / "merged")
    (tmp_path / "again").symlink_to(second)
    with pytest.raises(DataError, match="a part is given twice"):
        merge([first, second, tmp_path / "again"], tmp_path / "out" / "merged")
    shard = second / "shard-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=f"{shard}.*the manifest says"):
        merge([first, second], tmp_path / "out" / "merged")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_existing_part_is_kept_and_one_of_other_rows_is_refused(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    spoil(rows, 1)
    options = dict(number=0, count=2, maxcount=5, maxsize=LARGE, max_rejects=1)
    first = build_part(rows, tmp_path / "out", **options)
    times = {path: path.stat().st_mtime_ns for path in first[0].iterdir()}
    assert build_part(rows, tmp_path / "out", **options) == first
    assert {path: path.stat().st_mtime_ns for path in first[0].iterdir()} == times
    spoil(rows, 2)
    with pytest.raises(DataError, match=r"the output already exists .*out.part-00000-of-00002"):
        build_part(rows, tmp_path / "out", **options)


def test_a_part_that_is_not_finished_is_none_of_another_build(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    (tmp_path / "out.part-00000-of-00002.unfinished").mkdir()
    check_no_other_parts(tmp_path / "out", describe_part([rows], 0, 2, 5, LARGE))


def test_too_many_parts(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows")
    with pytest.raises(DataError, match=r"more parts than shards .*--maxcount 4\): rows: 10, shards: 3, parts: 4;"):
        build_parts(rows, tmp_path / "out", 4, maxcount=4)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mirage-data", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code

    rows, output = write_rows(tmp_path / "rows"), tmp_path / "shards"
    options = ["--input", rows, "--output", output, "--maxcount", 4]
    assert run("build", *options, "--part", "2/2") == 2
    assert "--part 2/2" in capsys.readouterr().err
    assert [run("build", *options, "--part", f"{number}/2") for number in (0, 1)] == [0, 0]
    parts = [folder_of(output, number, 2) for number in (0, 1)]
    assert (
        f"wrote 4 samples in 1 shard, {parts[0].joinpath('shard-000000.tar').stat().st_size} bytes, to {parts[0]}"
        in (capsys.readouterr().out)
    )
    assert run("merge", *parts, "--output", output) == 0
    assert capsys.readouterr().out.startswith("wrote 10 samples in 3 shards")
    assert json.loads((output / "manifest.json").read_text())["num_samples"] == 10
