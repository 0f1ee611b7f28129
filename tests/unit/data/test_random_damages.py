"""200 random damages to a data set, its server and what is kept of it: each is named, or the run continues.

Then a run that was killed and started again has its losses. None makes it wait without end, and none runs code.

A run is all of a trainer's ways to its data, in this process: the checks at its start, the stream, the encoder, and the
loss of a small model. Real ranks, killed: tests/distributed/test_on_fault.py and test_damages.py.
"""

import io
import os
import pickle
import random
import re
import shutil
import signal
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import pytest
import torch
from dealt import in_order
from file_server import Server, serving
from generated_rows import write_rows
from small_disk import SmallDisk, may_mount
from transformers import AutoTokenizer

from data_tools.build import build
from mirage_ds.data import remote
from mirage_ds.data.collate import collate
from mirage_ds.data.counts import count_texts, counts_name, load_counts, save_counts
from mirage_ds.data.encode import EncodedSample, Encoder, load_encoder
from mirage_ds.data.index import check_digests
from mirage_ds.data.places import Reading
from mirage_ds.data.shards import load_manifest
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, make_loader
from mirage_ds.data.unusable import check_usable
from mirage_ds.errors import MirageError
from mirage_ds.hf.preset import write_tiny
from mirage_ds.model.backbone import load_backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.paths import Location

DAMAGES = 200
SAMPLES, GLOBAL_BATCH, KILLED_AFTER = 10, 2, 2  # a run has one epoch; it is killed after so many steps
STEPS = SAMPLES // GLOBAL_BATCH
LIMIT_S = 60  # of a run: then it hangs
NAMED = re.compile(r"shard-00000\d\.tar|manifest\.json|index/|tokens-")


class Trap:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@dataclass
class Ground:
    """What all damages start from."""

    folder: Path  # of shards, intact, with counted tokens
    encoder: Encoder
    model: MirageModel
    counts: str  # name of the file of counted tokens
    trap: Path  # exists if something was unpickled

    def loss(self, samples: Sequence[EncodedSample]) -> float:
        with torch.no_grad():
            return self.model(collate(samples, align_latents=False)).loss.item()


@dataclass
class Outcome:
    """Of a run from a step on."""

    losses: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # of samples that were replaced
    error: str = ""  # what ended it


@dataclass
class Scene:
    """One damage: where the run reads, and what happens before one of its steps."""

    ground: Ground
    rng: random.Random
    place: Path  # its own folder
    stack: ExitStack
    location: Location = ""
    reading: Reading = field(default_factory=Reading)
    before_step: Callable[[], None] = lambda: None
    says: str = ""

    def copied(self) -> Path:
        """The run reads a copy of the folder, from a disk."""
        self.location = Path(shutil.copytree(self.ground.folder, self.place / "shards"))
        return self.location

    def served(self, folder: Path) -> Server:
        """The run reads a folder from a server, and keeps it."""
        server = self.stack.enter_context(serving(folder))
        self.location, self.reading = server.url, Reading(self.place / "cache", timeout_s=0.25)
        return server


def run(scene: Scene, first_step: int, on_fault: str) -> Outcome:
    outcome, ground = Outcome(), scene.ground
    with time_limit(), torch.no_grad():
        try:
            folder = load_manifest(scene.location, scene.reading)
            check_digests(folder)
            check_usable(ground.encoder, folder)
            load_counts(ground.counts, folder, stage="stage1")
            steps = in_order(Share(0, 1, GLOBAL_BATCH, start=GLOBAL_BATCH * first_step), folder, seed=3)
            batches = make_loader(
                SampleReader(folder), ground.encoder, list, steps, num_workers=0, on_fault=on_fault, timeout_s=30
            )
            found = islice(batches, STEPS - first_step)
            for step in range(first_step, STEPS):
                if step == KILLED_AFTER - 1 and first_step == 0:
                    scene.before_step()
                samples = next(found)
                outcome.faults += [fault for sample in samples for fault in sample.faults]
                outcome.losses.append(ground.loss(samples))
        except MirageError as error:
            outcome.error = str(error)
    return outcome


@contextmanager
def time_limit() -> Iterator[None]:
    def end(number: int, frame: object) -> None:
        raise AssertionError(f"a run hangs: {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def truncate(path: Path, rng: random.Random, trap: Path) -> None:
    os.truncate(path, rng.randrange(path.stat().st_size))


def flip(path: Path, rng: random.Random, trap: Path) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def remove(path: Path, rng: random.Random, trap: Path) -> None:
    path.unlink()


def zeros(path: Path, rng: random.Random, trap: Path) -> None:
    content = bytearray(path.read_bytes())
    at = rng.randrange(len(content))
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def pickled(path: Path, rng: random.Random, trap: Path) -> None:
    """In place of the file; of a shard also as a member in place of its first sample's JSON, of the same size."""
    payload = pickle.dumps(Trap(trap))
    if path.suffix != ".tar" or rng.random() < 0.3:
        path.write_bytes(payload.ljust(path.stat().st_size, b"\0"))
        return
    content = path.read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        info = rng.choice(tar.getmembers())
    info.name = info.name.partition(".")[0] + rng.choice([".pyd", ".pth", ".json", ".input_0.png"])
    header, at = info.tobuf(tarfile.USTAR_FORMAT), info.offset_data
    body = payload.ljust(info.size, b"\0")[: info.size]
    path.write_bytes(content[: info.offset] + header + body + content[at + info.size :])


def on_disk(scene: Scene, damage: Callable[[Path, random.Random, Path], None]) -> None:
    """Of any file before the run starts; or of a shard while it runs, as the index is mapped into memory."""
    folder, running = scene.copied(), scene.rng.random() < 0.5
    files = [path for path in folder.rglob("*.tar" if running else "*") if path.is_file() and path.stat().st_size]
    path = scene.rng.choice(sorted(files))
    scene.says = f"{path.name} {'while it runs' if running else 'before'}"
    action = partial(damage, path, scene.rng, scene.ground.trap)
    if running:
        scene.before_step = action
    else:
        action()


def on_the_servers_disk(scene: Scene, damage: Callable[[Path, random.Random, Path], None]) -> None:
    on_disk(scene, damage)
    scene.served(scene.location)


def of_answers(scene: Scene, fault: str) -> None:
    """Some of the server's answers, at the start too."""
    server = scene.served(scene.ground.folder)
    server.faults += scene.rng.choices(["ok", fault], weights=(7, 1), k=24)


def cache_files(scene: Scene) -> list[Path]:
    return sorted((scene.place / "cache").iterdir())


def of_the_cache(scene: Scene, damage: Callable[[Path, random.Random, Path], None]) -> None:
    """Of a shard that is kept."""
    scene.served(scene.ground.folder)

    def act() -> None:
        damage(scene.rng.choice([path for path in cache_files(scene) if path.suffix == ".shard"]), scene.rng, Path())

    scene.before_step = act


def expired(scene: Scene) -> None:
    """All or some of what is kept disappears, as another process makes room."""
    scene.served(scene.ground.folder)

    def act() -> None:
        if scene.rng.random() < 0.3:
            shutil.rmtree(scene.place / "cache")
        else:
            files = cache_files(scene)
            for path in scene.rng.sample(files, scene.rng.randint(1, len(files))):
                path.unlink()

    scene.before_step = act


def full_disk(scene: Scene) -> None:
    """The disk of the cache, before a step, with room for so many more bytes."""
    scene.served(scene.ground.folder)
    mount = scene.place / "disk"
    mount.mkdir()
    disk = scene.stack.enter_context(SmallDisk(mount, 2**20))
    scene.reading = Reading(disk.outside / "cache", timeout_s=5)
    scene.before_step = partial(disk.fill, spare_bytes=scene.rng.choice([0, 5000, 20_000]))


FILE_DAMAGES = (truncate, flip, remove, zeros, pickled)
TRANSIENT = ("stall", "cut", "short", "500")
KINDS: dict[str, Callable[[Scene], None]] = {
    **{f"disk: {damage.__name__}": partial(on_disk, damage=damage) for damage in FILE_DAMAGES},
    **{f"server's disk: {damage.__name__}": partial(on_the_servers_disk, damage=damage) for damage in FILE_DAMAGES},
    **{
        f"answers: {fault}": partial(of_answers, fault=fault)
        for fault in (*TRANSIENT, "wrong", "noise", "refuse", "long")
    },
    **{f"cache: {damage.__name__}": partial(of_the_cache, damage=damage) for damage in (truncate, flip, remove, zeros)},
    "cache: expired": expired,
}
if may_mount():
    KINDS["cache: full disk"] = full_disk
HEALED = (*(f"answers: {fault}" for fault in TRANSIENT), *(kind for kind in KINDS if kind.startswith("cache: ")))
"""After which the run has the losses of intact data, always."""


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    folder = tmp_path_factory.mktemp("ground")
    rows = write_rows(folder / "rows", SAMPLES)
    write_tiny(rows, folder / "model", seed=0)
    build(rows, folder / "shards", maxcount=4, maxsize=10**9)
    shards, tokenizer = load_manifest(folder / "shards"), AutoTokenizer.from_pretrained(folder / "model")
    save_counts(shards, tokenizer, count_texts(shards, tokenizer, system_turn=True), system_turn=True)
    backbone = load_backbone(str(folder / "model"), dtype=torch.float32)
    return Ground(
        folder / "shards",
        load_encoder(str(folder / "model"), stage="stage1", latent_size=4),
        MirageModel(backbone, stage="stage1", ce_loss_weight=0.1),
        counts_name(tokenizer, system_turn=True),
        folder / "trap",
    )


def test_the_trap_works(ground: Ground) -> None:
    pickle.loads(pickle.dumps(Trap(ground.trap)))
    ground.trap.rmdir()


def test_each_damage_is_named_or_survived_with_the_same_losses(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT_S", 0.002)
    seed = random.randrange(10**6)
    print("seed", seed)
    intact = run(Scene(ground, random.Random(), tmp_path, ExitStack(), ground.folder), 0, "stop")
    assert (len(intact.losses), intact.error) == (STEPS, "")
    tally = {kind: Counter[str]() for kind in KINDS}
    for number, kind in enumerate(islice(cycle(KINDS), DAMAGES)):
        rng, place = random.Random(f"{seed}/{number}"), tmp_path / str(number)
        place.mkdir()
        with ExitStack() as stack:
            scene, on_fault = Scene(ground, rng, place, stack), rng.choice(["stop", "skip"])
            KINDS[kind](scene)
            whole = run(scene, 0, on_fault)
            step = min(KILLED_AFTER, len(whole.losses))
            again = run(scene, step, on_fault)
        said = capfd.readouterr().err
        case = (seed, number, kind, scene.says, on_fault, whole, again, said)
        assert not ground.trap.exists(), case
        named = [*whole.faults, *again.faults, *filter(None, (whole.error, again.error))]
        assert all(NAMED.search(message) for message in named), case
        is_named = bool(named) or "it has sha256" in said
        tally[kind]["named" if is_named else "survived"] += 1
        if isinstance(scene.location, Path):  # a disk's damage stays as it is
            refused = again.error and not again.losses
            assert refused or (whole.losses[step:], whole.error) == (again.losses, again.error), case
        elif not is_named:
            assert (whole.losses, again.losses) == (intact.losses, intact.losses[KILLED_AFTER:]), case
        assert not (is_named and kind in HEALED), case
        shutil.rmtree(place)
    print(tally)
    assert tally["disk: remove"]["named"]
