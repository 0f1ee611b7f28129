"""Rows and shard members: their contents survive, and every user mistake is a DataError that names the location."""

import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mirage_ds.data.images import open_image
from mirage_ds.data.rows import (
    Sample,
    check_sample,
    num_image_blocks,
    num_latent_blocks,
    read_row,
    read_rows,
)
from mirage_ds.data.shard_samples import from_members, to_members
from mirage_ds.data.texts import RESERVED_TOKENS
from mirage_ds.errors import DataError

FORMATS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "BMP": "bmp", "GIF": "gif"}


def test_rows_are_read_with_their_images_and_other_fields(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data", count=3)
    samples = list(read_rows(path))
    assert [where for where, _ in samples] == [f"{path}:{line}" for line in (1, 2, 3)]
    sample = samples[2][1]
    row = make_row(2)
    assert sample == Sample(
        key="000000002",
        text_input=row["text_input"],
        text_output=row["text_output"],
        input_images=((path.parent / row["image_input"]).read_bytes(),),
        helper_images=((path.parent / row["image_output"]).read_bytes(),),
        extra={"id": row["id"], "map_desc": row["map_desc"]},
    )


def test_images_may_be_absent_null_one_or_a_list(tmp_path: Path) -> None:
    for number in (0, 1):
        (tmp_path / f"{number}.png").write_bytes(image_bytes(seed=number))

    def read(**images: Any) -> Sample:
        row = {"text_input": "Q", "text_output": "A", **images}
        return read_row(row, key="k", where="here", folder=tmp_path)

    assert read().input_images == read(image_input=None).input_images == read(image_input=[]).input_images == ()
    assert len(read(image_input="0.png").input_images) == 1
    both = read(image_input=["1.png", "0.png"])
    assert both.input_images == (image_bytes(seed=1), image_bytes(seed=0))
    assert read(image_output="0.png").helper_images == (image_bytes(seed=0),)


def test_latent_sizes_are_of_all_blocks_or_of_each(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(image_bytes())

    def read(blocks: int, **more: Any) -> Sample:
        row = {"text_input": "Q", "text_output": "A" + "<output_image>" * blocks, "image_output": ["0.png"] * blocks}
        sample = read_row(row | more, key="k", where="here", folder=tmp_path)
        assert from_members("k", to_members(sample)) == sample
        return sample

    assert read(2).latent_sizes == read(2, latent_size=None).latent_sizes == ()
    assert read(2, latent_size=3).latent_sizes == (3, 3)
    assert read(3, latent_size=[2, 8, 2]).latent_sizes == (2, 8, 2)
    assert read(0, latent_size=3).latent_sizes == read(0, latent_size=[]).latent_sizes == ()
    in_front = read(1, latent_size=[5], text_output="No slot")
    assert (in_front.latent_sizes, in_front.extra) == ((5,), {})


def test_empty_lines_are_skipped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data", count=2)
    path.write_text(path.read_text().replace("\n", "\n\n"))
    assert [where for where, _ in read_rows(path)] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_input": None}, "text_input is None"),
        ({"text_input": ""}, "text_input is ''"),
        ({"text_output": 5}, "text_output is 5"),
        ({"image_input": 5}, "image_input: 5 is not a path"),
        ({"image_input": ["images/0_0.png", ""]}, "image_input: '' is not a path"),
        ({"image_input": "images/none.png"}, "image_input cannot be read: 'images/none.png'"),
        ({"image_output": "images"}, "image_output cannot be read: 'images'"),
        ({"image_output": "a\0b"}, "image_output cannot be read"),
        ({"image_input": None}, "image slots in text_input: 1, input images: 0"),
        ({"image_input": ["images/0_0.png"] * 2}, "image slots in text_input: 1, input images: 2"),
        ({"text_input": "<image><image>"}, "image slots in text_input: 2, input images: 1"),
        ({"text_input": "<image> <output_image>"}, "image slots in text_input: 2, input images: 1"),
        ({"text_input": "<output_image>"}, "image slots in text_input: 2, input images: 1"),
        ({"image_output": None}, "<output_image> slots in text_output: 1, helper images: 0"),
        ({"text_output": "<output_image><output_image>"}, "<output_image> slots in text_output: 2, helper images: 1"),
        (
            {"text_output": "x", "image_output": ["images/0_1.png"] * 2},
            "<output_image> slots in text_output: 0, helper images: 2",
        ),
        ({"text_output": "\ud800 <output_image>"}, "half of a surrogate pair at character 0"),
        ({"latent_size": 0}, "latent_size is 0"),
        ({"latent_size": "4"}, "latent_size is '4'"),
        ({"latent_size": True}, "latent_size is True"),
        ({"latent_size": 2.0}, "latent_size is 2.0"),
        ({"latent_size": [4, -1]}, "latent_size is [4, -1]"),
        ({"latent_size": []}, "numbers in latent_size: 0, latent blocks of the row: 1"),
        ({"latent_size": [4, 4]}, "numbers in latent_size: 2, latent blocks of the row: 1"),
        ({"text_output": "A", "image_output": None, "latent_size": "x"}, "latent_size is 'x'"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "data", count=2)
    write_jsonl(path, [make_row(0), make_row(0) | change])
    with pytest.raises(DataError) as error:
        list(read_rows(path))
    assert message in str(error.value)
    assert f"{path}:2" in str(error.value)


@pytest.mark.parametrize("token", RESERVED_TOKENS)
@pytest.mark.parametrize("name", ["text_input", "text_output"])
def test_special_tokens_in_a_text_are_refused(token: str, name: str) -> None:
    texts = {"text_input": "Q", "text_output": "A"}
    with pytest.raises(DataError, match=rf"{name} contains .*here"):
        check_sample(Sample("k", **(texts | {name: f"a{token}b"})), "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text_input": ', "malformed JSON"),
        (b'{"text_input": "\xff"}', "malformed JSON"),
        (b"[" * 100_000, "malformed JSON"),
        (b"[1]", "the row is a list"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = write_rows(tmp_path / "data", count=1)
    path.write_bytes(path.read_bytes() + line)
    with pytest.raises(DataError, match=message) as error:
        list(read_rows(path))
    assert f"{path}:2" in str(error.value)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the rows: No such file"):
        list(read_rows(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"no rows .*empty\.jsonl"):
        list(read_rows(tmp_path / "empty.jsonl"))


def test_block_counts() -> None:
    assert num_image_blocks(Sample("", "no slot", "", (b"",) * 2)) == 2
    assert num_image_blocks(Sample("", "<image> and <image>", "", (b"",))) == 2
    assert (
        num_image_blocks(Sample("", "<output_image>", "", (b"",))) == 2
    )  # as in the reference: one in front, one at the slot
    assert num_latent_blocks(Sample("", "Q", "A")) == 0
    assert num_latent_blocks(Sample("", "Q", "A", (), (b"",))) == 1
    assert num_latent_blocks(Sample("", "Q", "<output_image> A <output_image>", (), (b"",) * 2)) == 2


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
field_names = st.text().filter(lambda name: not name.startswith(("text_", "image_", "latent_size")))
pictures = st.lists(st.sampled_from(sorted(FORMATS)).map(lambda name: image_bytes(image_format=name)), max_size=12)


@given(st.text(min_size=1), st.text(min_size=1), pictures, pictures, st.dictionaries(field_names, json_values))
@settings(max_examples=50)
def test_members_give_the_sample_back(
    question: str, answer: str, inputs: list[bytes], helpers: list[bytes], extra: dict[str, Any]
) -> None:
    sample = Sample("000000001", question, answer, tuple(inputs), tuple(helpers), extra)
    assert from_members(sample.key, to_members(sample)) == sample


def test_members_are_named_as_webdataset_wants_them() -> None:
    images = tuple(image_bytes(image_format=name) for name in FORMATS)
    members = to_members(Sample("k", "Q", "A", images, images[:1], {"id": "x"}))
    inputs = [f"input_{number}.{extension}" for number, extension in enumerate(FORMATS.values())]
    assert list(members) == ["json", *inputs, "helper_0.png"]
    assert json.loads(members["json"]) == {"text_input": "Q", "text_output": "A", "id": "x"}
    assert members["input_1.jpg"] == images[1]


def test_only_images_become_members() -> None:
    with pytest.raises(DataError, match=r"unknown image format \(k\.helper_0\)"):
        to_members(Sample("k", "Q", "A", (), (b"II*\0",)))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"input_0.png": b""}, "k.json is missing"),
        ({"json": b"{"}, "malformed JSON: .*k.json"),
        ({"json": b'{"text_input": "Q"}'}, "no field text_output .k.json., fields: 'text_input';"),
        ({"json": b'{"text_input": "Q", "text_output": "A"}', "cls": b"1"}, "unknown member k.cls"),
        ({"json": b'{"text_input": "Q", "text_output": "A"}', "input_01.png": b""}, "unknown member k.input_01.png"),
        (
            {"json": b'{"text_input": "Q", "text_output": "A"}', "input_1.png": b""},
            r"k.input images are numbered \[1\]",
        ),
        (
            {"json": b'{"text_input": "Q", "text_output": "A"}', "helper_0.png": b"", "helper_2.png": b""},
            r"k.helper images are numbered \[0, 2\]",
        ),
    ],
)
def test_bad_members_are_named(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError, match=message):
        from_members("k", members)


@pytest.mark.parametrize("image_format", FORMATS)
def test_the_allowed_formats_open(image_format: str) -> None:
    assert open_image(image_bytes((84, 56), image_format=image_format), "here").size == (84, 56)


def huge_png(width: int, height: int) -> bytes:
    """A PNG whose header claims a size, with the pixels of a small image."""
    data = image_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be decoded: not an image of a known format"),
        (b"no image", "cannot be decoded: not an image of a known format"),
        (image_bytes(image_format="TIFF"), "cannot be decoded: not an image of a known format"),
        (image_bytes()[:-30], "cannot be decoded: .*truncated"),
        (huge_png(100_000, 100_000), "cannot be decoded: Image size"),
        (huge_png(9_500, 9_500), "the image has 9500 x 9500 pixels"),
        (image_bytes((402, 2)), "the image has 402 x 2 pixels"),
    ],
)
def test_images_that_cannot_be_used_are_named(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"{message}.*rows.jsonl:7"):
        open_image(data, "rows.jsonl:7")


@pytest.mark.filterwarnings("ignore")
@given(st.data())
@settings(max_examples=300)
def test_a_damaged_image_opens_or_is_a_data_error(data: st.DataObject) -> None:
    image = bytearray(image_bytes(image_format=data.draw(st.sampled_from(sorted(FORMATS)))))
    for _ in range(data.draw(st.integers(1, 8))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        open_image(bytes(image[: data.draw(st.integers(0, len(image)))]), "here")


def test_all_pixels_of_an_image_are_decoded() -> None:
    image = open_image(image_bytes(), "here")
    with Image.open(io.BytesIO(image_bytes())) as expected:
        assert image.tobytes() == expected.tobytes()


def test_no_torch_is_needed() -> None:
    code = "import sys, mirage_ds.data.rows, mirage_ds.data.shards; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"text_input": "q", "text_output": "a", "score": NaN}', r"NaN is no JSON.*rows\.jsonl:1.*fix the line"),
        ('{"text_input": "q", "text_output": "a", "text_input": "r"}', r'"text_input" stands twice .*rows\.jsonl:1'),
        ('{"text_input": "q", "text_output": "a", "x": {"y": 1, "y": 2}}', r'"y" stands twice .*rows\.jsonl:1'),
        (
            '{"text_input": "q", "text_output": "<image> b"}',
            r"text_output contains <image> .*write <output_image> there",
        ),
        ('{"text_input": "q", "text_output": "a", "image_input": "' + "x" * 1000 + '"}', r"x: File name too long \("),
        ('{"text_input": "q", "text_output": "a", "image_input": "rows.jsonl/a.png"}', r"Not a directory \("),
        ('{"text_input": "q", "text_output": "a", "image_input": "."}', r"Is a directory \("),
    ],
)
def test_what_used_to_be_taken_or_dropped_is_named(tmp_path: Path, row: str, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(row)
    with pytest.raises(DataError, match=message) as refused:
        list(read_rows(tmp_path / "rows.jsonl"))
    assert len(str(refused.value)) < 500


def test_a_byte_order_mark_is_no_part_of_the_rows(tmp_path: Path) -> None:
    """Notepad writes it; `cat` of two such files has it in the middle."""
    row = json.dumps({"text_input": "q", "text_output": "a"}).encode()
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\n\xef\xbb\xbf" + row + b"\n\xef\xbb\xbf\n")
    assert [sample.text_input for _, sample in read_rows(tmp_path / "rows.jsonl")] == ["q", "q"]
