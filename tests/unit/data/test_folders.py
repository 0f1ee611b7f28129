"""Several folders of shards as one data set: configuration, numbers, and whether samples are those of the folders."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from generated_rows import make_row, write_jsonl, write_rows

from data_tools.build import build
from launch.doctor.all_checks import facts
from launch.doctor.recipe_checks import check_shards
from launch.planner.estimate import estimate
from launch.planner.level import folder_costs
from launch.planner.plan import assumptions
from mirage_ds.config import Config
from mirage_ds.data.costs import SampleCosts, SetCosts
from mirage_ds.data.folders import ShardFolders, find_folders, load_folders
from mirage_ds.data.helpers import Helpers
from mirage_ds.data.index import load_index
from mirage_ds.data.mixture import order_of
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.steps import Share, Steps
from mirage_ds.data.stream import FoldersReader, SampleReader, make_loader
from mirage_ds.data.target_cache import TargetCache, TargetCaches
from mirage_ds.early_checks import check_inputs
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.recipe import load_config
from mirage_ds.sizing.measured import workload
from mirage_ds.sizing.workload import Seen, Workload

RECIPE = Path(__file__).parents[3] / "launch" / "recipes" / "tiny-stage1.yaml"
SIZES, WEIGHTS = {"maps": 10, "puzzles": 6, "other/maps": 3}, (1.0, 0.5, 2.0)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three folders of shards with different rows."""
    folder = tmp_path_factory.mktemp("sets")
    for number, (name, size) in enumerate(SIZES.items()):
        build(write_rows(folder / f"rows{number}", size), folder / name, maxcount=2 + number, maxsize=10**9)
    return folder


def configuration(ground: Path, *more: str) -> Config:
    sets = [{"path": str(ground / name), "weight": weight} for name, weight in zip(SIZES, WEIGHTS, strict=True)]
    return load_config(RECIPE, [f"data.shards={json.dumps(sets)}", "run.seed=7", *more])


@pytest.fixture
def mixed(ground: Path) -> ShardFolders:
    return load_folders(configuration(ground).data)


def test_the_forms_of_a_recipe() -> None:
    one = load_config(RECIPE, ["data.shards=a"])
    assert one.data.shards == Path("a")
    assert [(each.path, each.weight) for each in one.data.sets] == [(Path("a"), 1.0)]
    many = load_config(RECIPE, ["data.shards=[a, {path: b, weight: 0.5}, {path: c}, {path: ~/d, weight: 3}]"])
    found = [(str(each.path), each.weight) for each in many.data.sets]
    assert found == [("a", 1.0), ("b", 0.5), ("c", 1.0), (str(Path.home() / "d"), 3.0)]
    for config in (one, many):  # as RUN/config.yaml has it
        again = yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json")))
        assert Config.model_validate(again) == config


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[]", r"data\.shards: \[\] names no folder of shards; allowed: a path, or a list .*; name at least one"),
        ("{path: b, weight: 2}", r"one folder with a weight; .*put it into a list"),
        ("3", r"data\.shards: 3 names no folder of shards"),
        (
            "[a, {path: b, weight: 0}]",
            r"folder 2 of the list cannot be used .*weight: .*greater than 0.*above 0.*; corr",
        ),
        ("[{path: b, weight: 1.7e+308}]", r"folder 1 of the list cannot be used .*weight: .*1000000"),
        ("[{path: b, weight: .inf}]", r"folder 1 of the list cannot be used .*weight: .*finite"),
        ("[{path: b, weight: 'much'}]", r"folder 1 of the list cannot be used .*weight: .*number"),
        ("[{path: b, wieght: 1}]", r"folder 1 of the list cannot be used .*unknown key wieght; allowed: path, weight;"),
        ("[{weight: 1}]", r"folder 1 of the list cannot be used .*path: .*required"),
        ("[a, 7]", r"folder 2 of the list cannot be used \(7\)"),
        (
            "[a, b, {path: a, weight: 2}]",
            r"a is named 2 times; each folder may stand once in the list; give it the sum",
        ),
    ],
)
def test_a_wrong_mixture_is_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(RECIPE, [f"data.shards={value}"])


def test_names_numbers_and_digest(ground: Path, mixed: ShardFolders) -> None:
    assert mixed.names == ("maps", "puzzles", "maps-2")
    assert mixed.num_samples == 19
    assert [mixed.locate(number) for number in (0, 9, 10, 15, 16, 18)] == [
        *((0, 0), (0, 9)),
        *((1, 0), (1, 5)),
        *((2, 0), (2, 2)),
    ]
    alone = load_config(RECIPE, [f"data.shards={ground / 'maps'}"])
    listed = load_config(RECIPE, [f"data.shards=[{ground / 'maps'}]"])
    halved = load_config(RECIPE, [f"data.shards=[{{path: {ground / 'maps'}, weight: 0.5}}]"])
    digests = [load_folders(config.data).digest for config in (alone, listed, halved)]
    assert digests[:2] == [load_manifest(ground / "maps").digest] * 2
    assert len({*digests, mixed.digest}) == 3
    turned = ShardFolders(mixed.folders[::-1], mixed.weights[::-1])
    assert turned.digest != mixed.digest  # it is another order


def test_the_same_samples_twice_are_refused(ground: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(ground / "maps")
    config = load_config(RECIPE, [f"data.shards=[{ground / 'maps'}, {tmp_path / 'link'}]"])
    with pytest.raises(DataError, match=r"two folders of data\.shards have the same samples .*; remove one of them"):
        load_folders(config.data)


def test_a_folder_that_is_missing_is_named(ground: Path, tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"data.shards=[{ground / 'maps'}, {tmp_path / 'none'}]"])
    with pytest.raises(DataError, match=r"no manifest\.json: .*none"):
        check_inputs(config)
    assert find_folders(config.data) is None


def test_samples_are_those_of_their_folders(ground: Path, mixed: ShardFolders) -> None:
    """Other helper images come from rows of the same folder."""
    helpers = Helpers("shuffled", 3)
    read = FoldersReader(mixed, helpers=helpers)
    first = 0
    for which, (name, size) in enumerate(SIZES.items()):
        alone = SampleReader(load_manifest(ground / name), helpers=helpers)
        for number in range(size):
            sample, expected = read(first + number), alone(number)
            assert sample.set_number == which
            assert sample.key == f"{mixed.names[which]}/{expected.key}"
            assert (sample.text_input, sample.text_output) == (expected.text_input, expected.text_output)
            assert (sample.input_images, sample.helper_images) == (expected.input_images, expected.helper_images)
        first += size


def test_targets_are_kept_folder_by_folder(mixed: ShardFolders, tmp_path: Path) -> None:
    """A slot of all is a slot of its folder's own cache, which another mixture finds again."""
    facts: dict[str, Any] = {"latent_size": 2, "values": 3, "limit_bytes": 10**6}
    caches = TargetCaches(tuple(TargetCache.open(tmp_path, folder, {}, **facts) for folder in mixed.folders))
    read = FoldersReader(mixed, caches)
    slots = [read(number).target_slots for number in range(19)]
    assert sorted(slot for each in slots for slot in each) == list(range(sum(map(len, slots))))
    written = [17, 2, 12]
    for number in written:
        values = np.full((2, 3), number, np.float32).tobytes()
        caches.write(list(slots[number]), [values] * len(slots[number]))
    found = {number for number in range(19) if read(number).cached_targets is not None}
    assert found == {number for number in written if slots[number]}
    for number in found:
        which, own = mixed.locate(number)
        assert caches.caches[which].read(caches.caches[which].slots(own)) == read(number).cached_targets
        assert set(np.frombuffer(read(number).cached_targets, np.float32)) == {number}


def image_tokens(sizes: Any) -> Any:
    return np.prod(np.asarray(sizes), axis=1) // 784


def costs_of(mixed: ShardFolders) -> SetCosts:
    return SetCosts(tuple(SampleCosts(load_index(folder), image_tokens, "stage1", 2) for folder in mixed.folders))


def test_costs_are_those_of_their_folders(mixed: ShardFolders) -> None:
    costs = costs_of(mixed)
    expected = [part.all() for part in costs.parts]
    for name in ("tokens", "costs", "passes"):
        whole = np.concatenate([getattr(part, name) for part in expected])
        assert getattr(costs.all(), name).tolist() == whole.tolist()
        numbers = np.array([18, 0, 11, 11, 9, 10])
        assert getattr(costs.of(numbers), name).tolist() == whole[numbers].tolist()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_every_cut_and_every_resume_has_the_same_samples(ground: Path, mixed: ShardFolders, shuffle: str) -> None:
    """Over two epochs and more, read by ranks and workers, from positions in the middle of an epoch."""
    config = configuration(ground, f"data.shuffle={shuffle}")
    order, size = order_of(config, mixed), 4
    assert order.num_positions == 10 + 3 + 6
    expected = [FoldersReader(mixed)(number).key for number in order.samples(0, 48)]

    def stream(share: Share, num_workers: int) -> Any:
        steps = Steps(order_of(config, mixed), costs_of(mixed), share)
        return make_loader(FoldersReader(mixed), as_it_is, list, steps, num_workers=num_workers)

    for world_size, rows, num_workers, start in ((1, 4, 0, 0), (2, 1, 0, 12), (4, 1, 1, 20), (1, 2, 3, 28)):
        accumulation = size // world_size // rows
        shares = [Share(rank, world_size, rows, accumulation, start) for rank in range(world_size)]
        streams = [iter(stream(share, num_workers)) for share in shares]
        for begin in range(start, 48, size):
            taken = [next(each) for each in streams for _ in range(accumulation)]
            keys = [sample.key for batch in taken for sample in batch]
            assert sorted(keys) == sorted(expected[begin : begin + size])


def as_it_is(sample: Sample) -> Sample:
    return sample


def test_the_planner_sees_all_folders(ground: Path) -> None:
    config = configuration(ground, "model.path=Qwen/Qwen2.5-VL-3B-Instruct")
    found = workload(config)
    assert (Seen(found.shapes).count, found.num_samples) == (19, 19)
    thrice = json.dumps([str(ground / "maps"), {"path": str(ground / "puzzles"), "weight": 3}])
    more = load_config(RECIPE, [f"data.shards={thrice}", "model.path=Qwen/Qwen2.5-VL-3B-Instruct"])
    said = assumptions(more, [estimate(more, 1, 2, "h100-80gb")])
    assert any("16 samples, 28 in an epoch; " in line for line in said)
    assert all(name in found.source for name in SIZES)
    planned = folder_costs(config)
    assert planned is not None
    assert len(planned.costs) == 19
    assert planned.level(config, 2).imbalance >= 1
    assert folder_costs(configuration(ground.parent, "model.path=Qwen/Qwen2.5-VL-3B-Instruct")) is None


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_mean_row_is_that_of_an_epoch(ground: Path, tmp_path: Path, stage: str) -> None:
    """10 short rows half of the time, and 2 long ones with another K three times, against each folder alone."""
    path = write_rows(tmp_path / "rows", 2)
    long = {"text_output": "word " * 500 + "<output_image> word", "latent_size": 9}
    build(
        write_jsonl(path, [make_row(number) | long for number in range(2)]),
        tmp_path / "long",
        maxcount=9,
        maxsize=10**9,
    )
    places, weights, positions = (ground / "maps", tmp_path / "long"), (0.5, 3), (5, 6)
    sets = [{"path": str(place), "weight": weight} for place, weight in zip(places, weights, strict=True)]

    def planned(shards: str) -> Workload:
        model = ("model.path=Qwen/Qwen2.5-VL-3B-Instruct", f"train.stage={stage}")
        return workload(load_config(RECIPE, [f"data.shards={shards}", *model]))

    mixed, alone = planned(json.dumps(sets)), [planned(str(place)).mean for place in places]
    assert alone[1].tokens > 2 * alone[0].tokens
    for size in ("tokens", "targets", "patches", "blocks", "single_columns", "attended"):
        expected = np.average([getattr(row, size) for row in alone], weights=positions)
        for found in (mixed.mean, mixed.mean_of(1)):
            assert abs(getattr(found, size) - expected) <= 1.5, size  # all are rounded


def test_the_doctor_reads_all_folders(ground: Path, mixed: ShardFolders) -> None:
    config = configuration(ground)
    rows = list(check_shards(config))
    assert [(row.what, row.state) for row in rows] == [("data.shards", "ok")] * 3
    assert all(f"({ground / name})" in row.found for row, name in zip(rows, SIZES, strict=True))
    assert facts(config)["data.shards"] == mixed.digest
