"""Which places of the order have their images hidden: a function of seed and position alone, however it is cut."""

import itertools

import pytest
from dealt import in_order
from transformers import PreTrainedTokenizerBase

from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.image_dropout import drops_image
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.shards import ShardFolder
from mirage_ds.data.steps import Share
from mirage_ds.data.stream import SampleReader, make_loader

SEED, SHARE = 3, 0.4
DRAWN = [0, 4, 9, 11, 13, 16, 18, 19, 20, 22]
"""Of the first 24 places."""


def drops(position: int) -> bool:
    return drops_image(SEED, SHARE, position)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_its_share_of_the_places_is_drawn(share: float) -> None:
    """Within 5 standard deviations of independent draws."""
    count = 20_000
    drawn = [drops_image(SEED, share, position) for position in range(count)]
    spread = (count * share * (1 - share)) ** 0.5
    assert abs(sum(drawn) - count * share) <= 5 * spread
    both = sum(one and following for one, following in itertools.pairwise(drawn))
    assert abs(both - (count - 1) * share**2) <= 10 * spread, "a draw says nothing of the next one"


def test_the_draws_are_fixed() -> None:
    """A resumed run, with whatever version, draws the same; another seed draws others."""
    assert [position for position in range(24) if drops(position)] == DRAWN
    assert [drops_image(4, SHARE, position) for position in range(24)] != list(map(drops, range(24)))
    larger = {position for position in range(24) if drops_image(SEED, 0.7, position)}
    assert larger > set(DRAWN)


@pytest.fixture
def encoder(tiny_tokenizer: PreTrainedTokenizerBase, image_processor: ImageProcessor) -> Encoder:
    return Encoder(tiny_tokenizer, image_processor, stage="stage1", latent_size=2)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize(
    ("ranks", "micro_batch", "start", "num_workers"), [(1, 1, 0, 0), (2, 1, 0, 0), (1, 4, 0, 2), (2, 2, 8, 0)], ids=str
)
def test_every_cut_has_the_same_rows_hidden(
    shards: ShardFolder, encoder: Encoder, ranks: int, micro_batch: int, start: int, num_workers: int
) -> None:
    """Of 24 places, in the third epoch of 10 samples: by ranks, micro-batches, workers, and after a resume."""
    found: dict[int, bool] = {}
    for rank in range(ranks):
        steps = in_order(Share(rank, ranks, micro_batch, start=start), shards, seed=SEED)
        loader = make_loader(SampleReader(shards), encoder, list, steps, num_workers=num_workers, drops_image=drops)
        for positions, samples in itertools.islice(zip(steps.micro_batches(), loader, strict=False), 24):
            found |= {place: each.hides_images for place, each in zip(positions, samples, strict=True)}
    assert [place for place in range(start, 24) if found[place]] == [place for place in DRAWN if place >= start]


def test_without_it_no_images_are_hidden(shards: ShardFolder, encoder: Encoder) -> None:
    loader = make_loader(
        SampleReader(shards), encoder, list, in_order(Share(0, 1, 4), shards, seed=SEED), num_workers=0
    )
    samples: list[EncodedSample] = [each for batch in itertools.islice(loader, 3) for each in batch]
    assert not any(sample.hides_images for sample in samples)
