"""The stream: the plan's order for any number of workers, any start, and errors that name shard and key."""

import contextlib
import io
import itertools
import multiprocessing
import os
import signal
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dealt import in_order
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from mirage_ds.data.costs import SampleCosts
from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.index import load_index
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.plan import Plan
from mirage_ds.data.rows import Sample, read_rows
from mirage_ds.data.shard_samples import parse_members
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.steps import Share, Steps
from mirage_ds.data.stream import SampleReader, make_loader
from mirage_ds.errors import DataError


def as_is(sample: Sample) -> Sample:
    """Replaces the encoder where only the order matters."""
    return sample


def keys_and_threads(samples: list[Sample]) -> tuple[list[str], int]:
    """Replaces collate."""
    return [sample.key for sample in samples], torch.get_num_threads()


def keys(folder: ShardFolder, share: Share, count: int, num_workers: int = 0) -> list[str]:
    loader = make_loader(
        SampleReader(folder), as_is, keys_and_threads, in_order(share, folder, seed=3), num_workers=num_workers
    )
    return [key for batch, _ in itertools.islice(loader, count) for key in batch]


@pytest.fixture
def encoder(tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor) -> Encoder:
    return Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=2)


def test_samples_come_back_as_the_rows_gave_them(rows: Path, shards: ShardFolder) -> None:
    reader = SampleReader(shards)
    for number, (_, sample) in enumerate(read_rows(rows)):
        read = reader(number)
        assert read.key == f"shard-{number // 4:06d}.tar/{number:09d}"
        assert (read.text_input, read.text_output, read.extra) == (sample.text_input, sample.text_output, sample.extra)
        assert (read.input_images, read.helper_images) == (sample.input_images, sample.helper_images)


@pytest.fixture
def spoiled(shards: ShardFolder) -> list[str]:
    """Keys of the first two epochs in the order of seed 3, after positions 3 and 4 of the first were spoiled."""
    order = Plan(10, shards.digest, 3).samples(0, 20)
    index = load_index(shards)
    for number in order[3:5]:
        path = shards.path / shards.manifest.shards[index[number].shard].name
        content = bytearray(path.read_bytes())
        content[index[number].offset : index[number].offset + 5] = b"wrong"
        path.write_bytes(content)
    used = [number for number in range(20)]
    for place in reversed(range(19)):
        if order[place] in order[3:5]:
            used[place] = used[place + 1]
    return [f"{order[place]:09d}" for place in used]


def test_a_sample_that_cannot_be_used_is_replaced_by_the_next(
    shards: ShardFolder, encoder: Encoder, spoiled: list[str]
) -> None:
    """The others keep their positions, whatever the number of ranks and the start."""

    def read(share: Share, num: int) -> list[EncodedSample]:
        loader = make_loader(
            SampleReader(shards), encoder, list, in_order(share, shards, seed=3), num_workers=0, on_fault="skip"
        )
        return [sample for batch in itertools.islice(loader, num) for sample in batch]

    alone = read(Share(0, 1, 1), 18)
    assert [sample.key.partition("/")[2] for sample in alone] == spoiled[:18]
    assert [len(sample.faults) for sample in alone[2:6]] == [0, 2, 1, 0]
    assert all("damaged shard: bad checksum (shard-" in fault for fault in alone[3].faults)
    for start in (0, 4):
        ranks = [read(Share(rank, 2, 1, start=start), 6) for rank in (0, 1)]
        together = [sample.key for pair in zip(*ranks, strict=True) for sample in pair]
        assert together == [sample.key for sample in alone[start : start + 12]]


def test_many_faults_in_a_row_are_not_skipped(shards: ShardFolder) -> None:
    """They are no single samples: the shards are gone, or the model is another one."""

    def refuse(sample: Sample) -> EncodedSample:
        raise DataError(f"wrong ({sample.key})")

    loader = make_loader(
        SampleReader(shards), refuse, list, in_order(Share(0, 1, 1), shards, seed=3), num_workers=0, on_fault="skip"
    )
    with pytest.raises(DataError, match=r"100 samples in a row cannot be used; the first: wrong .*mirage-data check"):
        next(iter(loader))


@pytest.fixture(params=[{"balance": False}, {"balance": True}, {"token_budget": 160}], ids=str)
def dealt(request: pytest.FixtureRequest, shards: ShardFolder, encoder: Encoder) -> Callable[[Share], Steps]:
    """The steps of a share, dealt in each way."""
    costs = SampleCosts(load_index(shards), encoder.image_tokens, "stage1", 2)
    plan = Plan(shards.num_samples, shards.digest, 3)
    return lambda share: Steps(plan, costs, share, **request.param)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_the_number_of_workers_changes_nothing(
    shards: ShardFolder, encoder: Encoder, dealt: Callable[[Share], Steps]
) -> None:
    """With real encoding, over more than an epoch, bit for bit."""

    def batches(num_workers: int) -> list[list[EncodedSample]]:
        loader = make_loader(SampleReader(shards), encoder, list, dealt(Share(1, 2, 3, 2)), num_workers=num_workers)
        return list(itertools.islice(loader, 7))

    expected = batches(0)
    for num_workers in (1, 3):
        for batch, same in zip(batches(num_workers), expected, strict=True):
            for sample, expected_sample in zip(batch, same, strict=True):
                assert sample.key == expected_sample.key
                for name in ("input_ids", "labels", "position_ids", "pixel_values", "pixel_values_latent"):
                    assert torch.equal(getattr(sample, name), getattr(expected_sample, name))


@pytest.mark.parametrize("dealt", [{"balance": False}, {"balance": True}], indirect=True, ids=str)
def test_however_dealt_a_step_has_the_samples_of_the_order(
    shards: ShardFolder, encoder: Encoder, spoiled: list[str], dealt: Callable[[Share], Steps]
) -> None:
    """Also where a sample that cannot be used was replaced by the next of the order."""
    for number, step in enumerate(steps_with_faults(shards, encoder, dealt)):
        found = [sample.key.partition("/")[2] for batch in step for sample in batch]
        assert sorted(found) == sorted(spoiled[6 * number : 6 * number + 6])


@pytest.mark.parametrize("dealt", [{"token_budget": 160}], indirect=True, ids=str)
def test_what_replaces_a_sample_fits_into_its_packed_row(
    shards: ShardFolder, encoder: Encoder, spoiled: list[str], dealt: Callable[[Share], Steps]
) -> None:
    lengths = SampleCosts(load_index(shards), encoder.image_tokens, "stage1", 2).all().tokens
    steps = steps_with_faults(shards, encoder, dealt)
    rows = [[sample.key.partition("/")[2] for sample in batch] for step in steps for batch in step]
    assert sum(map(len, rows)) == 18
    assert any(sample.faults for step in steps for batch in step for sample in batch)
    assert all(sum(lengths[int(key)] for key in row) <= 160 for row in rows)


def steps_with_faults(
    shards: ShardFolder, encoder: Encoder, dealt: Callable[[Share], Steps]
) -> list[list[list[EncodedSample]]]:
    """The micro-batches of both ranks in each of three steps of 6 samples."""
    ranks = [dealt(Share(rank, 2, 3)) for rank in (0, 1)]
    loaders = [
        iter(make_loader(SampleReader(shards), encoder, list, steps, num_workers=0, on_fault="skip")) for steps in ranks
    ]
    return [
        [next(each) for steps, each in zip(ranks, loaders, strict=True) for _ in steps.at(start).micro_batches]
        for start in (0, 6, 12)
    ]


def test_the_stream_follows_the_plan_and_can_start_anywhere(shards: ShardFolder) -> None:
    plan = Plan(10, shards.digest, 3)
    everything = [key.partition("/")[2] for key in keys(shards, Share(0, 1, 1), 48)]
    assert everything == [f"{number:09d}" for number in plan.samples(0, 48)]
    for start in (4, 12, 40):
        later = [key.partition("/")[2] for key in keys(shards, Share(0, 1, 2, 2, start), 4)]
        assert later == everything[start : start + 8]


@pytest.mark.parametrize("split", [(2, 1, 2), (1, 2, 2), (1, 4, 1), (2, 2, 1), (4, 1, 1)])
def test_every_split_gives_the_same_global_batches(shards: ShardFolder, split: tuple[int, int, int]) -> None:
    world_size, micro, accumulation = split
    ranks = [
        keys(shards, Share(rank, world_size, micro, accumulation, 8), 4 * accumulation) for rank in range(world_size)
    ]
    share = micro * accumulation
    expected = keys(shards, Share(0, 1, 4, 1, 8), 4)
    for batch in range(4):
        parts = [key for rank in ranks for key in rank[batch * share : (batch + 1) * share]]
        assert sorted(parts) == sorted(expected[4 * batch : 4 * batch + 4])


def test_workers_use_one_thread(shards: ShardFolder) -> None:
    loader = make_loader(
        SampleReader(shards), as_is, keys_and_threads, in_order(Share(0, 1, 1), shards, seed=0), num_workers=1
    )
    assert next(iter(loader))[1] == 1


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_workers_leave_signals_to_their_rank(shards: ShardFolder, number: signal.Signals) -> None:
    """SLURM and terminals send them to every process; the rank's handlers do not work in a fork of it."""
    before = signal.signal(number, lambda *_: os._exit(3))
    try:
        loader = make_loader(
            SampleReader(shards), as_is, keys_and_threads, in_order(Share(0, 1, 1), shards, seed=3), num_workers=1
        )
        batches = iter(loader)
        first, _ = next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, number)
        rest = [key for batch, _ in itertools.islice(batches, 9) for key in batch]
    finally:
        signal.signal(number, before)
    assert sorted(first + rest) == sorted(keys(shards, Share(0, 1, 10), 1))


def damage(folder: ShardFolder, number: int, at: int, data: bytes) -> None:
    """Overwrites bytes of a sample in its shard, at an offset from its first byte."""
    entry = load_index(folder)[number]
    path = folder.path / folder.manifest.shards[entry.shard].name
    with path.open("r+b") as file:
        file.seek(entry.offset + at)
        file.write(data)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_damaged_sample_is_named_at_its_turn(shards: ShardFolder, encoder: Encoder, num_workers: int) -> None:
    """Only the message, without a worker's traceback."""
    order = Plan(10, shards.digest, 3).samples(0, 10)
    damage(shards, order[4], 512 + 8, b"garbage")  # in the helper's PNG
    loader = iter(
        make_loader(
            SampleReader(shards), encoder, list, in_order(Share(0, 1, 2), shards, seed=3), num_workers=num_workers
        )
    )
    assert [sample.key[-9:] for batch in (next(loader), next(loader)) for sample in batch] == [
        f"{number:09d}" for number in order[:4]
    ]
    where = f"shard-{order[4] // 4:06d}.tar/{order[4]:09d}.helper_0"
    with pytest.raises(DataError, match=rf"^the image cannot be decoded: .*\({where}\)"):
        next(loader)


@pytest.mark.parametrize(
    ("number", "at", "data", "message"),
    [
        (5, 0, b"000000009.helper_0.png", "unexpected member 000000009.helper_0.png"),
        (5, 156, b"2", "damaged shard"),  # the type of the first member is now a link, with a wrong checksum
        (5, 0, b"\xff" * 512, "damaged shard"),
    ],
)
def test_a_damaged_header_is_named(shards: ShardFolder, number: int, at: int, data: bytes, message: str) -> None:
    damage(shards, number, at, data)
    with pytest.raises(DataError, match=rf"damaged shard: .*\(shard-000001.tar/00000000{number}\)"):
        SampleReader(shards)(number)


def test_a_shard_that_shrinks_or_disappears_is_named(shards: ShardFolder) -> None:
    reader = SampleReader(shards)
    path = shards.path / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(
        DataError, match=r"only 700 of \d+ bytes from byte 0 can be read \(shard-000002.tar/000000008\)"
    ):
        reader(8)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read the shard: No such file .*\(shard-000002.tar/000000008\)"):
        reader(8)


def sample_range(*members: tarfile.TarInfo) -> bytes:
    """The bytes of a tar file without its end marker."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for info in members:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
        size = tar.offset
    return buffer.getvalue()[:size]


def member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, "/etc/passwd" if kind != tarfile.REGTYPE else ""
    return info


@pytest.mark.parametrize(
    "members",
    [
        [member("k.json"), member("k.input_0.png", tarfile.SYMTYPE)],
        [member("k.json"), member("k.input_0.png", tarfile.LNKTYPE)],
        [member("k.json"), member("k.input_0.png", tarfile.DIRTYPE)],
        [member("k.json"), member("k.input_0.png", tarfile.FIFOTYPE)],
        [member("k.json"), member("other.input_0.png")],
        [member("k.json"), member("k.json")],
        [member("k.json"), member("../k.input_0.png")],
    ],
)
def test_only_regular_members_of_the_key_are_read(members: list[tarfile.TarInfo]) -> None:
    with pytest.raises(DataError, match=r"damaged shard: unexpected member .*\(shard/k\)"):
        parse_members(sample_range(*members), "k", "shard/k")


def test_a_damaged_header_between_members_is_not_taken_as_the_end() -> None:
    data = bytearray(sample_range(member("k.json", size=600), member("k.helper_0.png", size=5)))
    assert parse_members(bytes(data), "k", "shard/k") == {"json": b"x" * 600, "helper_0.png": b"x" * 5}
    data[512 + 1024 + 3] ^= 1
    with pytest.raises(DataError, match=r"damaged header at byte 1536 \(shard/k\)"):
        parse_members(bytes(data), "k", "shard/k")


@given(st.data())
@settings(max_examples=300)
def test_any_damage_is_a_data_error_or_harmless(data: st.DataObject) -> None:
    content = bytearray(sample_range(member("k.json", size=20), member("k.input_0.png", size=700)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(DataError):
        parse_members(bytes(content[: data.draw(st.integers(0, len(content)))]), "k", "shard/k")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_data_that_do_not_come_are_an_error(shards: ShardFolder, num_workers: int) -> None:
    """Not a wait without end."""

    def hang(sample: Sample) -> EncodedSample:
        time.sleep(4)
        raise AssertionError

    loader = make_loader(
        SampleReader(shards), hang, list, in_order(Share(0, 1, 1), shards, seed=3), num_workers=num_workers, timeout_s=1
    )
    with pytest.raises(DataError, match=r"no batch came for 1 s \(micro-batch 0 .*distributed\.timeout_s"):
        next(iter(loader))
