"""Control arms: who gets whose helper images, at every start and on every rank; what is refused before a run."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from dealt import in_order
from generated_rows import image_bytes, make_row, write_jsonl, write_rows
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from data_tools.build import build
from mirage_ds.config import HelperImages, Stage
from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.costs import row_sizes
from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.helpers import Helpers, Replaced
from mirage_ds.data.index import load_index
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.plan import Plan
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder, load_manifest
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, make_loader
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import DataError

ARMS: tuple[HelperImages, ...] = (True, "gray", "input", "shuffled", "none")
MakeEncoder = Callable[[Stage], Encoder]


@pytest.fixture
def make_encoder(tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor) -> MakeEncoder:
    return lambda stage: Encoder(tiny_tokenizer, image_processor, stage=stage, latent_size=3)


def make_shards(folder: Path, **changes: dict[str, object]) -> ShardFolder:
    """10 rows with images of several sizes, `rowN` with changes."""
    rows = write_rows(folder / "rows", 10).parent / "rows.jsonl"
    write_jsonl(rows, [make_row(number) | changes.get(f"row{number}", {}) for number in range(10)])
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    return load_manifest(folder / "shards")


@pytest.fixture
def mixed(tmp_path: Path) -> ShardFolder:
    """Row 2 has no helper image, row 4 two, row 6 one without a slot for it."""
    return make_shards(
        tmp_path,
        row2={"image_output": None, "text_output": "No image"},
        row4={
            "text_output": "<output_image>a<output_image>b",
            "image_output": ["images/4_1.png", "images/5_1.png"],
            "latent_size": [2, 5],
        },
        row6={"text_output": "So \\boxed{A}."},
    )


def entry(helpers: int) -> IndexEntry:
    return IndexEntry("", 0, 0, 0, [(28, 28)], [(28, 28)] * helpers, 1, 1, 1, helpers)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(0, 2**31 - 1))
def test_shuffled_is_a_derangement_of_the_rows_with_helper_images(helpers: list[int], seed: int) -> None:
    donors = Helpers("shuffled", seed).donors(Index.of([entry(count) for count in helpers]), "digest").tolist()
    rows = [number for number, count in enumerate(helpers) if count]
    assert sorted(donors) == list(range(len(helpers)))
    assert all(donors[number] in rows for number in rows)
    if len(rows) > 1:
        assert all((donors[number] != number) == (number in rows) for number in range(len(helpers)))


def test_who_gets_whose_images_depends_on_seed_and_folder() -> None:
    """The numbers are fixed: a run that resumes with a newer version has the same."""

    def donors(seed: int, digest: str) -> list[int]:
        return Helpers("shuffled", seed).donors(Index.of([entry(1)] * 8), digest).tolist()

    assert donors(3, "a") == [1, 3, 4, 7, 0, 2, 5, 6]
    assert len({tuple(donors(*each)) for each in itertools.product((3, 4), ("a", "b"))}) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
def test_every_rank_worker_and_start_shuffles_alike(mixed: ShardFolder) -> None:
    """Over an epoch and a half, from several positions: each row has the images it has when it is read alone."""
    read = SampleReader(mixed, helpers=Helpers("shuffled", 3))
    alone = {sample.key: sample for sample in map(read, range(10))}
    order = [f"{number:09d}" for number in Plan(10, mixed.digest, 3).samples(0, 16)]
    for world_size, num_workers, start in ((1, 0, 0), (2, 0, 4), (2, 2, 8), (4, 1, 4)):
        shares = [Share(rank, world_size, 4 // world_size, start=start) for rank in range(world_size)]
        streams = [
            make_loader(
                SampleReader(mixed, helpers=Helpers("shuffled", 3)),
                lambda sample: sample,
                list,
                in_order(share, mixed, seed=3),
                num_workers=num_workers,
            )
            for share in shares
        ]
        batches = zip(*(itertools.islice(stream, (16 - start) // 4) for stream in streams), strict=True)
        samples: list[Sample] = [sample for ranks in batches for batch in ranks for sample in batch]
        assert [sample.key.partition("/")[2] for sample in samples] == order[start:]
        assert samples == [alone[sample.key] for sample in samples]


def test_shuffled_helper_images_are_those_of_another_row(mixed: ShardFolder) -> None:
    """Found by their bytes, which all differ but those of the second image of row 4. Where a row has more places than
    the other one has images, the last one stands in the places that are left."""
    own = [SampleReader(mixed)(number) for number in range(10)]
    owners = {sample.helper_images: number for number, sample in enumerate(own) if sample.helper_images}
    for seed in range(6):
        read = SampleReader(mixed, helpers=Helpers("shuffled", seed))
        found = [read(number).helper_images for number in range(10)]
        assert found[2] == ()
        first, second = found[4]
        assert first == second
        donors = [owners[(first,)] if number == 4 else owners.get(found[number][:1]) for number in range(10)]
        receiver = found.index(own[4].helper_images[:1])
        assert donors[receiver] is None, "of the first image of row 4, which has two"
        donors[receiver] = 4
        del donors[2]
        assert sorted(donors) == [0, 1, 3, 4, 5, 6, 7, 8, 9]
        assert all(donor != number for donor, number in zip(donors, [0, 1, 3, 4, 5, 6, 7, 8, 9], strict=True))


@pytest.mark.parametrize("images", ARMS)
def test_the_index_has_the_sizes_of_what_is_encoded(
    mixed: ShardFolder, make_encoder: MakeEncoder, images: HelperImages
) -> None:
    """Patches of the tower and latents of each row; what the deal and the memory estimate count."""
    helpers, encoder = Helpers(images, 1), make_encoder("stage1")
    read = SampleReader(mixed, helpers=helpers)
    for number, each in enumerate(helpers.index(mixed)):
        encoded, size = encoder(read(number)), row_sizes(Index.of([each]), encoder.image_tokens, "stage1", 3)
        assert size.helper_patches == len(encoded.pixel_values_latent)
        assert list(size.latent_sizes) == encoded.latent_sizes
        assert size.pads == int((encoded.latent_mask | encoded.image_mask).sum())


def assert_same(found: EncodedSample, expected: EncodedSample) -> None:
    for name, value in vars(expected).items():
        other = getattr(found, name)
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_none_is_encoded_as_in_the_stage_text(mixed: ShardFolder, make_encoder: MakeEncoder, stage: Stage) -> None:
    """And as long: a limit that the latents alone exceed is kept without them."""
    none, text, encoder = Helpers("none"), make_encoder("text"), make_encoder(stage)
    read, read_none = SampleReader(mixed), SampleReader(mixed, helpers=none)
    longest = 0
    for number in range(10):
        expected = text(read(number))
        assert_same(encoder(read_none(number)), expected)
        longest = max(longest, len(expected.input_ids))
    encoder.max_length = longest
    check_usable(encoder, mixed, none)
    with pytest.raises(DataError, match=rf"more tokens than data\.max_length={longest}: "):
        check_usable(encoder, mixed)
    encoder.max_length = longest - 1
    with pytest.raises(DataError, match=rf"with {longest}"):
        check_usable(encoder, mixed, none)


@pytest.mark.parametrize("images", ARMS)
def test_rows_without_helper_images_are_untouched(
    mixed: ShardFolder, make_encoder: MakeEncoder, images: HelperImages
) -> None:
    own, found = SampleReader(mixed)(2), SampleReader(mixed, helpers=Helpers(images))(2)
    assert found == own
    assert_same(make_encoder("stage1")(found), make_encoder("stage1")(own))


def test_images_that_are_too_small_are_found_before_a_run(tmp_path: Path, make_encoder: MakeEncoder) -> None:
    """Row 3 has an input image of 2 x 3 merged patches, and asks for 7 latents of its helper image."""
    folder = make_shards(tmp_path, row3={"latent_size": 7})
    (tmp_path / "rows" / "images" / "3_0.png").write_bytes(image_bytes((56, 84)))
    build(tmp_path / "rows" / "rows.jsonl", tmp_path / "small", maxcount=4, maxsize=10**9)
    folder = load_manifest(tmp_path / "small")
    check_usable(make_encoder("stage1"), folder)
    with pytest.raises(DataError, match=r"6 merged patches for 7 latents \(shard-000000\.tar/000000003\.helper_0\)"):
        check_usable(make_encoder("stage1"), folder, Helpers("input"))


def test_rows_without_the_image_that_is_needed_are_refused(tmp_path: Path) -> None:
    """By the index alone; all are counted, the first five named."""
    bare = {"image_input": None, "text_input": "Which way?"}
    rest = {"image_output": None, "text_output": "No image"}
    (tmp_path / "few").mkdir()
    folder = make_shards(tmp_path / "few", row0=bare | rest, **{f"row{number}": bare for number in range(2, 9)})
    for images in (True, "gray", "shuffled", "none"):
        Helpers(images).index(folder)
    named = ", ".join(f"shard-00000{number // 4}.tar/00000000{number}" for number in range(2, 7))
    with pytest.raises(DataError) as error:
        Helpers("input").index(folder)
    assert f"rows with a helper image but no input image: 7 ({folder.path}): {named} and 2 more; " in str(error.value)
    (tmp_path / "one").mkdir()
    folder = make_shards(tmp_path / "one", **{f"row{number}": rest for number in range(1, 10)})
    for images in (True, "gray", "input", "none"):
        Helpers(images).index(folder)
    with pytest.raises(DataError, match=r"rows with helper images: 1 \(.*data\.helper=shuffled .* at least 2; use"):
        Helpers("shuffled").index(folder)


def spoil(folder: ShardFolder, number: int) -> None:
    """Damages the header of a sample, so that it cannot be read."""
    place = load_index(folder)[number]
    path = folder.path / folder.manifest.shards[place.shard].name
    content = bytearray(path.read_bytes())
    content[place.offset : place.offset + 5] = b"wrong"
    path.write_bytes(content)


def test_a_row_whose_donor_cannot_be_read_is_a_fault_of_its_own(shards: ShardFolder, make_encoder: MakeEncoder) -> None:
    """It is skipped like the donor itself; the message has both rows."""
    helpers = Helpers("shuffled", 3)
    donors = helpers.donors(load_index(shards), shards.digest).tolist()
    receiver, key = donors.index(6), "shard-000001.tar/000000006"
    spoil(shards, 6)
    read = SampleReader(shards, helpers=helpers)
    for number in range(10):
        if number not in (6, receiver):
            read(number)
    with pytest.raises(DataError, match=rf"\({key}\)"):
        read(6)
    with pytest.raises(DataError, match=rf"for shard-.*/{receiver:09d} \(data\.helper=shuffled\): .*\({key}\)"):
        read(receiver)
    row = next(number for number in range(4) if number not in (6, receiver))
    undecodable = replace(read(row), helper_images=(b"GIF8",))
    names = rf"\(shard-000000\.tar/{row:09d} with shard-00000\d\.tar/{donors[row]:09d}\.helper_0\)"
    with pytest.raises(DataError, match=rf"cannot be decoded: .* {names}"):
        make_encoder("stage1")(undecodable)
    in_turn = in_order(Share(0, 1, 10), shards, seed=3)
    stream = make_loader(
        SampleReader(shards, helpers=helpers), make_encoder("stage1"), list, in_turn, num_workers=0, on_fault="skip"
    )
    order = Plan(10, shards.digest, 3).samples(0, 20)
    for place, sample in enumerate(next(iter(stream))):
        following = [number for number in order[place:] if number not in (6, receiver)]
        assert sample.key.endswith(f"/{following[0]:09d}")
        assert len(sample.faults) == order[place:].index(following[0])


@given(st.data())
def test_any_rows_have_the_sizes_of_the_images_in_their_places(data: st.DataObject) -> None:
    """Row by row by hand; asked for in any order, more than once."""
    sizes = st.tuples(st.integers(1, 999), st.integers(1, 999))
    number = data.draw(st.integers(2, 8))
    rows = []
    for each in range(number):
        inputs = data.draw(st.lists(sizes, min_size=1, max_size=3))
        helpers = data.draw(st.lists(sizes, min_size=1 if each < 2 else 0, max_size=3))
        given = data.draw(st.none() | st.just([5] * len(helpers))) if helpers else None
        rows.append(IndexEntry(f"k{each}", each, 0, 0, inputs, helpers, 1, 1, 1, len(helpers), given))
    numbers, seed = data.draw(st.lists(st.integers(0, number - 1))), data.draw(st.integers(0, 9))
    for arm in ("none", "input", "shuffled"):
        helpers = Helpers(arm, seed)
        index = Index.of(rows)
        donors = helpers.donors(index, "digest")
        found = Replaced(index, helpers, donors).take(np.array(numbers, np.int64)).entries()
        for row, entry in zip((rows[number] for number in numbers), found, strict=True):
            if arm == "none":
                assert entry == replace(row, helper_sizes=[], latent_blocks=0, latent_sizes=None)
            else:
                others = row.input_sizes if arm == "input" else rows[donors[row.shard]].helper_sizes
                places = range(len(row.helper_sizes))
                assert entry == replace(row, helper_sizes=[others[min(place, len(others) - 1)] for place in places])
