"""The same answers on any number of ranks, after a kill, with more samples or more arms: ranks here are threads."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from talkative import write_questions, write_talkative

from mirage_ds.data.encode import Encoder
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.evaluation.answers import Answer
from mirage_ds.evaluation.engine import Engine
from mirage_ds.evaluation.latents.arms import parse_arms
from mirage_ds.evaluation.parts import Parts
from mirage_ds.evaluation.questions import read_questions_of
from mirage_ds.evaluation.ranks import Ranks
from mirage_ds.inference.generate import Decoder, load_decoder
from mirage_ds.inference.sampling import Sampling

NUM_ROWS, BATCH_SIZE, ARMS = 14, 3, "shuffled,zeroed,mean"
TIMEOUT_S = 120


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Encoder]:
    model = write_talkative(tmp_path_factory.mktemp("talkative"), {"<|latent_start|>": 3.0, "<|im_end|>": 2.0})
    return load_decoder(str(model), latent_size=4, max_new_tokens=20, dtype=torch.float32)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_questions(tmp_path_factory.mktemp("questions") / "rows", NUM_ROWS)


@pytest.fixture
def engine(loaded: tuple[Decoder, Encoder], questions: Path) -> Callable[..., Engine]:
    def make(arms: str = ARMS, temperature: float = 0.0, samples: int = 1) -> Engine:
        decoder, encoder = loaded
        decoder.sampling = Sampling(temperature, 0.9, seed=3)
        return Engine(decoder, encoder, read_questions_of(questions), parse_arms(arms), BATCH_SIZE, samples)

    return make


class Killed(BaseException):
    """Not an error of the engine's."""


def run(engine: Engine, folder: Path, num_ranks: int, kill_after: int | None = None) -> list[Answer]:
    """Runs ranks as threads; kills them all once one of them has written so many units.

    A thread that waits for one that has ended by an error ends too, as a rank does whose connection is gone.
    """
    folder.mkdir(exist_ok=True)
    barrier = threading.Barrier(num_ranks, timeout=TIMEOUT_S)
    values: list[Any] = [None] * num_ranks
    errors: list[BaseException] = []

    def gather(rank: int, value: Any) -> list[Any]:
        barrier.wait()
        values[rank] = value
        barrier.wait()
        return list(values)

    def work(rank: int) -> None:
        units = [0]

        def progress(done: int, total: int) -> None:
            units[0] += 1
            if units[0] == kill_after:
                raise Killed

        try:
            parts = Parts(folder, rank, engine.decoder.backbone.embed_tokens.embedding_dim)
            engine.run(parts, Ranks(rank, num_ranks, lambda value: gather(rank, value)), progress)
        except BaseException as error:  # noqa: BLE001 - whatever it is, nobody may wait for this rank
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(num_ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive(), "a rank hangs"
    if unexpected := [error for error in errors if not isinstance(error, Killed | threading.BrokenBarrierError)]:
        raise unexpected[0]
    assert bool(errors) == (kill_after is not None), errors
    by_arm = engine.in_order(Parts(folder, 0, engine.decoder.backbone.embed_tokens.embedding_dim).answers())
    return [answer for arm in by_arm.values() for answer in arm]


@pytest.fixture(scope="module")
def kept() -> dict[str, list[Answer]]:
    return {}


@pytest.fixture
def whole(engine: Callable[..., Engine], kept: dict[str, list[Answer]], tmp_path: Path) -> list[Answer]:
    """Uninterrupted, on one rank."""
    if not kept:
        kept["whole"] = run(engine(), tmp_path / "whole", 1)
    return kept["whole"]


def test_answers_are_in_the_order_of_the_file(whole: list[Answer]) -> None:
    arms = [arm.name for arm in parse_arms(ARMS)]
    places = [(arms.index(answer.arm), answer.number, answer.sample) for answer in whole]
    assert places == [(arm, row, 0) for arm in range(len(arms)) for row in range(NUM_ROWS)]
    texts = {arm: [answer.text for answer in whole if answer.arm == arm] for arm in arms}
    assert len({tuple(texts[arm]) for arm in arms}) == len(arms), "the replacements change nothing here"


def test_three_ranks(engine: Callable[..., Engine], whole: list[Answer], tmp_path: Path) -> None:
    assert run(engine(), tmp_path / "parts", 3) == whole
    written = [len((tmp_path / "parts" / f"rank_{rank}.jsonl").read_text().splitlines()) for rank in range(3)]
    assert max(written) - min(written) <= 2  # one in each of the two phases


@pytest.mark.parametrize("kills", [[(3, 1), (2, 2)], [(1, 7), (4, 1), (1, 3)]])
def test_killed_and_continued_by_other_numbers_of_ranks(
    engine: Callable[..., Engine], whole: list[Answer], tmp_path: Path, kills: list[tuple[int, int]]
) -> None:
    for num_ranks, after in kills:
        run(engine(), tmp_path / "parts", num_ranks, kill_after=after)
    assert run(engine(), tmp_path / "parts", 2) == whole
    lines = [line for path in (tmp_path / "parts").glob("*.jsonl") for line in path.read_text().splitlines()]
    names = [json.loads(line)["unit"] for line in lines]
    assert len(names) == len(set(names)) == 4 * -(-NUM_ROWS // BATCH_SIZE), "a batch was decoded twice"


def test_arms_may_be_added(engine: Callable[..., Engine], whole: list[Answer], tmp_path: Path) -> None:
    own = run(engine("own"), tmp_path / "parts", 1)
    assert own == whole[:NUM_ROWS]
    assert run(engine(), tmp_path / "parts", 2) == whole


def test_several_samples(engine: Callable[..., Engine], tmp_path: Path) -> None:
    """The first sample of each row is that of a run with one sample; the others have draws of their own."""
    single = run(engine("own", temperature=1.0), tmp_path / "one", 1)
    several = run(engine("own", temperature=1.0, samples=3), tmp_path / "three", 2)
    assert [(answer.number, answer.sample) for answer in several] == [(n, s) for n in range(NUM_ROWS) for s in range(3)]
    assert several[::3] == single
    assert len({tuple(answer.text for answer in several[sample::3]) for sample in range(3)}) == 3


def test_where_the_latents_are(engine: Callable[..., Engine]) -> None:
    """The characters before each latent, in the text without the white space at its ends."""
    made = engine()
    ids, encode = made.decoder.ids, made.encoder.tokenizer.encode
    first, second = "\n the plan", " is: üp"
    emitted = [*encode(first), ids.latent_start, *[ids.latent_pad] * 2, ids.latent_end, *encode(second)]
    emitted += [ids.latent_start, ids.latent_pad, ids.latent_end, *encode(" left")]
    assert made.latents_at(emitted) == [len("the plan")] * 2 + [len("the plan is: üp")]
    assert made.latents_at([ids.latent_start, ids.latent_pad, *encode(first)]) == [0]
    assert made.encoder.text_of(emitted).strip() == "the plan is: üp left"


def test_what_another_rank_wrote_must_be_seen(engine: Callable[..., Engine], tmp_path: Path) -> None:
    """Two ranks whose folders are not the same one: nothing is computed from half of the states."""
    made, decoder = engine("shuffled"), engine().decoder
    parts = Parts(tmp_path, 0, decoder.backbone.embed_tokens.embedding_dim)
    with pytest.raises(DataError, match=r"2 of 5 batches of answers are not seen .*; all ranks must see one folder"):
        made.run(parts, Ranks(0, 2, lambda value: [value, value]))


def test_a_user_s_mistake_is_raised_by_one_rank() -> None:
    """The first that has it; the others end with the same exit code."""
    error = ConfigError("wrong")

    def start(rank: int, own: ConfigError | None) -> None:
        with Ranks(rank, 3, lambda value: [None, error, error]).together():
            if own:
                raise own

    with pytest.raises(ConfigError, match="wrong"):
        start(1, error)
    for rank, own in ((0, None), (2, error)):
        with pytest.raises(SystemExit) as end:
            start(rank, own)
        assert end.value.code == 2
