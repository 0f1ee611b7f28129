"""What a run cannot use is counted by reason before it starts: against encoding every sample."""

import re
from pathlib import Path

import pytest
from generated_rows import image_bytes, make_row, write_jsonl, write_rows

from data_tools.build import build
from data_tools.count import count
from mirage_ds.config import Stage
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.stream import SampleReader
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import DataError
from mirage_ds.hf.preset import write_tiny

NUM_ROWS, K = 20, 8


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Every third row has a helper image of 2 x 3 merged patches, every fourth a long answer."""
    write_rows(tmp_path / "rows", NUM_ROWS)
    rows = [make_row(number) for number in range(NUM_ROWS)]
    for number in range(0, NUM_ROWS, 3):
        (tmp_path / "rows" / "images" / f"{number}_1.png").write_bytes(image_bytes((84, 56)))
    for row in rows[::4]:
        row["text_output"] = row["text_output"].replace("</think>", " and" * 100 + "</think>", 1)
    path = write_jsonl(tmp_path / "rows" / "rows.jsonl", rows)
    write_tiny(path, tmp_path / "model", seed=0)
    build(path, tmp_path / "shards", maxcount=6, maxsize=10**9)
    return tmp_path


def make_encoder(place: Path, stage: Stage, max_length: int | None) -> Encoder:
    return load_encoder(str(place / "model"), stage=stage, latent_size=K, max_length=max_length)


def refused(encoder: Encoder, folder: ShardFolder) -> dict[str, str]:
    """The samples that cannot be encoded, each with the error."""
    faults, read = {}, SampleReader(folder)
    for number in range(NUM_ROWS):
        try:
            encoder(read(number))
        except DataError as error:
            faults[f"{number:09d}"] = str(error)
    return faults


@pytest.mark.parametrize("stage", ["stage1", "stage2", "text"])
def test_all_that_the_encoder_refuses_is_counted_by_reason(place: Path, stage: Stage) -> None:
    folder = load_manifest(place / "shards")
    lengths = [
        len(make_encoder(place, "stage2", None)(SampleReader(folder)(number)).input_ids) for number in range(NUM_ROWS)
    ]
    limit = sorted(lengths)[NUM_ROWS // 2]
    long = make_encoder(place, "stage2" if stage != "text" else "text", limit)
    small = make_encoder(place, stage, None)
    with pytest.raises(DataError) as raised:
        check_usable(make_encoder(place, stage, limit), folder)
    message = str(raised.value)
    assert message.startswith(f"the run cannot use samples ({folder.path}, samples: {NUM_ROWS}):\n")
    lines = message.splitlines()[1:]
    expected = {"more tokens than": refused(long, folder), "helper images that": refused(small, folder)}
    expected = {reason: faults for reason, faults in expected.items() if faults}
    assert len(lines) == len(expected) == (2 if stage == "stage1" else 1)
    for reason, faults in expected.items():
        (line,) = (line for line in lines if line.startswith(f"  - {reason}"))
        assert f": {len(faults)}: " in line
        named = re.findall(r"shard-\d+\.tar/(\d{9})", line)
        assert named == list(faults)[:5]  # in order, each once
        assert (f" and {len(faults) - 5} more; " in line) == (len(faults) > 5)
    if stage == "stage1":
        assert "the helper image has 6 merged patches for 8 latents (shard-000000.tar/000000000.helper_0)" in message


@pytest.mark.parametrize("stage", ["stage2", "text"])
def test_counted_tokens_are_taken_without_reading_a_sample(place: Path, stage: Stage) -> None:
    """The message is the one without them: the lengths are exact either way."""
    folder, encoder = load_manifest(place / "shards"), make_encoder(place, stage, 100)
    with pytest.raises(DataError) as read:
        check_usable(encoder, folder)
    settings = {"system_turn": True, "min_pixels": None, "max_pixels": None, "max_length": None, "cache_dir": None}
    count(folder.path, str(place / "model"), latent_size=K, **settings)
    for shard in folder.path.glob("*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(DataError) as counted:
        check_usable(encoder, folder)
    assert str(counted.value) == str(read.value)
    encoder.max_length = 10**6
    check_usable(encoder, folder)
