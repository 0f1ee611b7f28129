"""What `mirage-data build` reads, and how it deals with it: several inputs, parquet, shuffled rows, a part for
validation, any number of workers. Against plain webdataset, plain json and pyarrow's own writer."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import webdataset
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from pyarrow import parquet

from data_tools import cli
from data_tools.build import build
from data_tools.building import inputs
from data_tools.building.inputs import START, InTheirOrder
from data_tools.building.shuffled import Shuffled
from data_tools.check import check
from data_tools.parts import build_part, merge
from mirage_ds.errors import ConfigError, DataError

LARGE = 10**9


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def samples(shards: Path) -> list[dict[str, Any]]:
    """As plain webdataset reads them."""
    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    return [
        {name: value for name, value in sample.items() if name not in ("__url__", "__local_path__")}
        for sample in webdataset.WebDataset(urls, shardshuffle=False)
    ]


def keys(shards: Path) -> list[str]:
    return [sample["__key__"] for sample in samples(shards)]


def text_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [{"text_input": f"Q {number}", "text_output": "A"} for number in range(start, start + count)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 rows, more than a few tasks of workers; three of them cannot be used."""
    path = write_rows(tmp_path_factory.mktemp("rows"), 70)
    lines = path.read_text().splitlines()
    for number in (3, 40, 41):
        lines[number] = "{"
    path.write_text("".join(line + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "options",
    [{"maxsize": LARGE}, {"maxsize": 9000, "shuffle_seed": 5, "val_fraction": 0.2}],
    ids=["plain", "all options"],
)
def test_any_number_of_workers_gives_the_same_bytes(rows: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for workers in (1, 2, 3):
        output = tmp_path / f"{workers}" / "shards"
        build(rows, output, maxcount=7, max_rejects=3, workers=workers, **options)
        found.append(file_bytes(output.parent))
    assert found[0] == found[1] == found[2]
    listed = [json.loads(line)["where"] for line in found[0]["shards/rejects.jsonl"].splitlines()]
    assert sorted(listed) == sorted(f"{rows}:{number + 1}" for number in (3, 40, 41))
    assert sum(name.endswith(".tar") for name in found[0]) >= 10


def test_workers_need_a_short_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", f"/tmp/{'x' * 100}")
    path = write_jsonl(tmp_path / "rows.jsonl", text_rows(3))
    with pytest.raises(ConfigError, match=r"105 bytes \(TMPDIR=.*allowed: 75; set TMPDIR=/tmp, or --workers 1"):
        build(path, tmp_path / "shards", workers=2, **limits())
    build(path, tmp_path / "shards", **limits())


def test_shards_are_those_of_webdatasets_own_writer(tmp_path: Path) -> None:
    """Cut at the same samples, and the same bytes, where members end in the middle of a block or at its end."""
    texts = [{"text_input": "Q" * (number * 37 % 1100 + 1), "text_output": "A", "id": number} for number in range(60)]
    build(write_jsonl(tmp_path / "rows.jsonl", texts), tmp_path / "shards", maxcount=9, maxsize=4000)
    (tmp_path / "plain").mkdir()
    pattern = f"{tmp_path}/plain/shard-%06d.tar"
    with webdataset.ShardWriter(pattern, maxcount=9, maxsize=4000, encoder=False, mtime=0, verbose=0) as writer:
        for number, row in enumerate(texts):
            writer.write({"__key__": f"{number:09d}", "json": json.dumps(row).encode()})
    plain = file_bytes(tmp_path / "plain")
    assert len(plain) > 7
    assert {name: data for name, data in file_bytes(tmp_path / "shards").items() if name.endswith(".tar")} == plain


def test_several_inputs_are_read_in_turn(tmp_path: Path) -> None:
    """Images are relative to their own file."""
    first, second = write_rows(tmp_path / "a", 3), write_rows(tmp_path / "b", 2)
    (tmp_path / "b" / "images" / "0_0.png").write_bytes(image_bytes(seed=77))
    build([first, second], tmp_path / "shards", maxcount=4, maxsize=LARGE)
    found = samples(tmp_path / "shards")
    assert [sample["__key__"] for sample in found] == [f"{number:09d}" for number in range(5)]
    images = [tmp_path / "a" / "images" / f"{number}_0.png" for number in range(3)]
    images += [tmp_path / "b" / "images" / f"{number}_0.png" for number in range(2)]
    assert [sample["input_0.png"] for sample in found] == [path.read_bytes() for path in images]
    with pytest.raises(DataError, match=r"no rows .*empty\.jsonl"):
        build([first, write_jsonl(tmp_path / "empty.jsonl", [])], tmp_path / "other", maxcount=4, maxsize=LARGE)


def test_parquet_gives_the_samples_of_jsonl(tmp_path: Path) -> None:
    """Images as bytes, as structs as Hugging Face writes them, and as paths; null counts as missing."""
    jsonl = write_rows(tmp_path / "rows", 9)
    lines = [json.loads(line) for line in jsonl.read_text().splitlines()]
    for line in lines[3:6]:  # without a helper image
        line["text_output"] = "A"
        del line["image_output"]
    write_jsonl(jsonl, lines)
    data = {name: (jsonl.parent / name).read_bytes() for line in lines for name in [line["image_input"]]}
    table = pyarrow.table(
        {
            "text_input": [line["text_input"] for line in lines],
            "text_output": [line["text_output"] for line in lines],
            "image_input": [[{"bytes": data[line["image_input"]], "path": "x.png"}] for line in lines],
            "image_output": [line.get("image_output") for line in lines],
            "id": [line["id"] for line in lines],
            "map_desc": [line["map_desc"] for line in lines],
        }
    )
    parquet.write_table(table, tmp_path / "rows" / "rows.parquet", row_group_size=4)
    parquet.write_table(
        table.set_column(2, "image_input", [[data[line["image_input"]] for line in lines]]),
        tmp_path / "rows" / "bytes.parquet",
    )
    for name in ("rows.jsonl", "rows.parquet", "bytes.parquet"):
        build(tmp_path / "rows" / name, tmp_path / name, maxcount=4, maxsize=LARGE)
        assert list(check(tmp_path / name)) == []
    assert samples(tmp_path / "rows.parquet") == samples(tmp_path / "rows.jsonl")
    assert file_bytes(tmp_path / "rows.parquet") == file_bytes(tmp_path / "rows.jsonl")
    assert file_bytes(tmp_path / "bytes.parquet") == file_bytes(tmp_path / "rows.jsonl")
    build([tmp_path / "rows" / "rows.parquet", jsonl], tmp_path / "both", maxcount=4, maxsize=LARGE)
    assert [sample["json"] for sample in samples(tmp_path / "both")] == 2 * [
        sample["json"] for sample in samples(tmp_path / "rows.jsonl")
    ]


def test_parquet_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path, message: str, **options: Any) -> None:
        with pytest.raises(DataError, match=message):
            build(path, tmp_path / "shards", maxcount=4, maxsize=LARGE, **options)

    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and no more")
    refused(path, r"cannot read the rows: .*rows\.parquet")
    parquet.write_table(pyarrow.table({"text_input": ["Q"], "text_output": ["A"], "blob": [b"x"]}), path)
    refused(path, r"a field is no JSON: .*bytes.*rows\.parquet, row 0")
    for column in (pyarrow.array([2**62], pyarrow.timestamp("us")), pyarrow.array([1], pyarrow.duration("ns"))):
        parquet.write_table(pyarrow.table({"text_input": ["Q"], "text_output": ["A"], "when": column}), path)
        refused(path, r"row group 0 has a value that .*rows\.parquet\); allowed: .* write the field as a text")
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["Q"])] * 2, names=["text_input"] * 2), path)
    refused(path, r"several columns have the name 'text_input' .*rows\.parquet")
    parquet.write_table(pyarrow.table({"text_input": ["Q"], "text_output": ["A"]}), path)
    refused(path, r"rows in parquet cannot be shuffled .*rows\.parquet", shuffle_seed=1)
    parquet.write_table(pyarrow.table({"text_input": ["Q"], "question": ["A"]}), path)
    refused(path, r"no field text_output \(.*rows\.parquet, row 0\)")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(path, r"need pyarrow, which is not installed .*pip install 'mirage_ds\[parquet\]'")


@pytest.mark.parametrize("rest", range(7))
def test_reading_goes_on_at_any_row(tmp_path: Path, rest: int) -> None:
    """From the place after each row come exactly the rows after it; across files, empty lines and row groups."""
    jsonl = write_jsonl(tmp_path / "a.jsonl", text_rows(2))
    jsonl.write_text("\ufeff\n" + jsonl.read_text().replace("\n", "\n\n"))
    parquet.write_table(pyarrow.Table.from_pylist(text_rows(3, start=2)), tmp_path / "b.parquet", row_group_size=2)
    last = write_jsonl(tmp_path / "c.jsonl", text_rows(1, start=5))
    order = InTheirOrder([jsonl, tmp_path / "b.parquet", last])
    all_rows = list(order.read(START))
    assert [row.number for row in all_rows] == list(range(6))
    assert [row.where.rpartition("/")[2] for row in all_rows] == [
        *("a.jsonl:2", "a.jsonl:4", "b.parquet, row 0", "b.parquet, row 1", "b.parquet, row 2", "c.jsonl:1")
    ]
    place = all_rows[rest - 1].after if rest else START
    assert list(order.read(place)) == all_rows[rest:]
    assert all_rows[-1].fraction == 1
    shuffled = Shuffled([jsonl, last], 3, tmp_path)
    permuted = list(shuffled.read(START))
    assert list(shuffled.read(permuted[rest % 3].after)) == permuted[rest % 3 + 1 :]
    # the same lines, whatever their order
    lines = {row.number: (row.where, row.content) for row in InTheirOrder([jsonl, last]).read(START)}
    assert {row.number: (row.where, row.content) for row in permuted} == lines


def test_shuffled_rows(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", text_rows(300))
    for name, seed in (("plain", None), ("one", 1), ("again", 1), ("two", 2)):
        build(rows, tmp_path / name, maxcount=100, maxsize=LARGE, shuffle_seed=seed)
    assert list(check(tmp_path / "one")) == []
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "again")
    orders = [keys(tmp_path / name) for name in ("plain", "one", "two")]
    assert len({tuple(order) for order in orders}) == 3
    by_key = [{sample["__key__"]: sample for sample in samples(tmp_path / name)} for name in ("plain", "one", "two")]
    assert by_key[0] == by_key[1] == by_key[2], "a key names the same row in any order"
    # Of a random order of 300 rows the first 100 are a sample of all: their mean number is 149.5, deviation 7.1.
    assert 115 < sum(map(int, orders[1][:100])) / 100 < 185
    parts = [
        build_part(rows, tmp_path / "merged", number=number, count=2, maxcount=100, maxsize=LARGE, shuffle_seed=1)[0]
        for number in (0, 1)
    ]
    merge(parts, tmp_path / "merged")
    assert file_bytes(tmp_path / "merged") == file_bytes(tmp_path / "one")


def test_rows_of_the_validation_part(tmp_path: Path) -> None:
    """By the sha256 of the key: about that part of the rows, and the same ones when rows are added."""
    for name, count in (("few", 200), ("more", 400)):
        rows = write_jsonl(tmp_path / f"{name}.jsonl", text_rows(count))
        build(rows, tmp_path / name, maxcount=50, maxsize=LARGE, val_fraction=0.25)
        train, val = keys(tmp_path / name), keys(tmp_path / f"{name}-val")
        assert sorted(train + val) == [f"{number:09d}" for number in range(count)]
        assert 0.15 * count < len(val) < 0.35 * count
        limit = (2**62).to_bytes(8, "big")
        assert all(hashlib.sha256(key.encode()).digest()[:8] < limit for key in val)
        assert list(check(tmp_path / f"{name}-val")) == []
    before, after = keys(tmp_path / "few-val"), keys(tmp_path / "more-val")
    assert after[: len(before)] == before
    (tmp_path / "few").rename(tmp_path / "moved")
    with pytest.raises(DataError, match=r"the output already exists \(.*few-val\)"):
        build(tmp_path / "few.jsonl", tmp_path / "few", **limits(val_fraction=0.1))


def limits(**more: Any) -> dict[str, Any]:
    return {"maxcount": 50, "maxsize": LARGE, **more}


def test_too_many_rejects_end_a_build_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A little later, as all bad rows that come soon are listed; the message is the same for any number of workers."""
    monkeypatch.setattr("data_tools.build.LOOK_ON_ROWS", 30)
    rows = text_rows(5000)
    for number in (10, 20, 30, 100):
        rows[number]["text_input"] = ""
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    read, messages = [], []

    def note(done: int, fraction: float) -> None:
        read.append(done)

    for workers in (1, 2):
        with pytest.raises(DataError, match=r"unusable rows: 3 of the first 51, where reading ended") as refused:
            build(path, tmp_path / "shards", **limits(max_rejects=1), workers=workers, report=note)
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert max(read) < 100


def test_the_command_with_all_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["mirage-data", "build", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        return exit_.value.code

    write_jsonl(tmp_path / "a.jsonl", text_rows(30))
    parquet.write_table(pyarrow.Table.from_pylist(text_rows(30, start=30)), tmp_path / "b.parquet")
    both = ["--input", tmp_path / "a.jsonl", "--input", tmp_path / "b.parquet"]
    assert run(*both, "--output", tmp_path / "s", "--val-fraction", 0.3, "--workers", 1) == 0
    said = capsys.readouterr().out
    num_val = len(keys(tmp_path / "s-val"))
    assert f"wrote {60 - num_val} samples in 1 shard" in said
    assert f"wrote {num_val} samples in 1 shard" in said
    assert str(tmp_path / "s-val") in said
    assert run(*both, "--output", tmp_path / "t", "--val-fraction", 1e-9, "--workers", 1) == 0
    assert f"for {tmp_path / 't-val'}: there is no such folder" in capsys.readouterr().out
    for options, message in (
        (("--val-fraction", 1.5), "--val-fraction 1.5 is no part of the rows"),
        (("--val-fraction", 0.5, "--part", "0/2"), "a part has one output"),
        (("--shuffle-seed", 1), "cannot be shuffled"),
    ):
        assert run(*both, "--output", tmp_path / "u", *options) == 2
        assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("u*"))


def test_rows_that_change_under_the_build_are_found(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", text_rows(40))

    def add_a_row(done: int, fraction: float) -> None:
        with path.open("a") as file:
            file.write(json.dumps(make_row(0)) + "\n")

    with pytest.raises(DataError, match="the rows changed while they were read"):
        build(path, tmp_path / "shards", **limits(max_rejects=9), report=add_a_row)
    assert not (tmp_path / "shards").exists()
    assert inputs.fingerprint([path])[0]["bytes"] == path.stat().st_size


def test_an_input_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    rows, link = write_rows(tmp_path / "rows", 2), tmp_path / "link.jsonl"
    link.symlink_to(rows)
    with pytest.raises(DataError, match=r"named twice \(.*rows.jsonl and .*link.jsonl\)"):
        build([rows, link], tmp_path / "shards", maxcount=LARGE, maxsize=LARGE, val_fraction=0.5)
    assert not (tmp_path / "shards").exists()


def test_what_is_no_image_is_rejected_by_its_path(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows", 2)
    image = json.loads(rows.read_text().splitlines()[1])["image_input"]
    name = image[0] if isinstance(image, list) else image
    (rows.parent / name).write_bytes(b"no image")
    _, rejects = build(rows, tmp_path / "shards", maxcount=LARGE, maxsize=LARGE, max_rejects=1)
    assert f"not an image of a known format ({rows}:2, image_input 0: {name})" in rejects[0]["reason"]
