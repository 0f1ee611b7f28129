"""The sizes of rows: of several latent blocks against the micro-batches that they make; what an index entry gives."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from random_samples import random_sample
from row_shapes import shape_of
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mirage_ds.config import Config
from mirage_ds.data.alignment import aligned_columns, num_columns
from mirage_ds.data.collate import collate
from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.encode import EncodedSample
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.sizing.measured import measure
from mirage_ds.sizing.workload import Shape, Workload, aligned

# K of each block of a row.
MIXED = [[4], [2, 8], [], [3, 1, 5], [8]]


def samples(sizes: list[list[int]]) -> list[EncodedSample]:
    return [random_sample(seed, stage="stage2", latent_size=each) for seed, each in enumerate(sizes)]


@pytest.mark.parametrize(
    ("stage", "sizes", "hides"),
    [
        *(("stage2", sizes, False) for sizes in ([4], [1], [2, 8], [3, 1, 5], [])),
        *((stage, sizes, True) for stage in ("stage1", "stage2") for sizes in ([4], [2, 8])),
    ],
    ids=str,
)
def test_a_row_has_the_passes_of_its_micro_batch(stage: str, sizes: list[int], hides: bool) -> None:
    """Cut as the rollout cuts it: before each column with a latent, and before that from which on images are hidden."""
    sample = replace(random_sample(0, stage=stage, latent_size=sizes), hides_images=hides)
    row, batch = shape_of(sample, stage).row(), collate([sample], align_latents=stage == "stage2")
    starts = {*batch.hide_columns, *(batch.latent_columns if stage == "stage2" else [])}
    passes = list(pairwise([0, *sorted(starts), batch.input_ids.shape[1]]))
    longer = [end for start, end in passes if end - start > 1]
    assert row.tokens == batch.num_tokens
    assert 1 + row.latents == len(passes)
    assert row.single_columns == len(passes) - len(longer)
    assert row.past == (passes[-1][0] if sizes else 0)
    assert row.attended == (sum(longer) if sizes else 0)


def test_rows_of_one_pass() -> None:
    row = shape_of(random_sample(1, stage="stage1", latent_size=[2, 3]), "stage1").row()
    assert (row.latents, row.past, row.attended) == (0, 0, 0)
    assert row.tokens == len(random_sample(1, stage="stage1", latent_size=[2, 3]).input_ids)


def test_no_aligned_micro_batch_is_larger() -> None:
    """Of two rows each, of all at once, and where all blocks have one K: there it is exact."""
    rows = samples(MIXED)
    for batch in (rows, *map(list, product(rows, rows))):
        bound = aligned([shape_of(sample, "stage2") for sample in batch]).row()
        assert num_columns(aligned_columns(batch)) <= bound.tokens
        assert latent_columns(batch) <= bound.latents
    alike = samples([[4], [4, 4], [4], [4, 4, 4]])
    bound = aligned([shape_of(sample, "stage2") for sample in alike]).row()
    assert (bound.tokens, bound.latents) == (num_columns(aligned_columns(alike)), latent_columns(alike))


def latent_columns(rows: list[EncodedSample]) -> int:
    found = [each[sample.latent_mask] for each, sample in zip(aligned_columns(rows), rows, strict=True)]
    return len({column for each in found for column in each.tolist()})


def test_the_expected_passes_are_the_mean_over_all_draws() -> None:
    shapes = [shape_of(sample, "stage2") for sample in samples(MIXED)] * 7
    for size in (1, 2, 3):
        draws = [aligned(draw).row() for draw in product(shapes[: len(MIXED)], repeat=size)]
        found = Workload(shapes, len(shapes), "").mean_of(size)
        assert found.blocks == pytest.approx(sum(row.blocks for row in draws) / len(draws), abs=0.5)
        assert found.single_columns == pytest.approx(sum(row.single_columns for row in draws) / len(draws), abs=0.5)
        assert found.tokens == Workload(shapes, len(shapes), "").mean.tokens


def test_what_the_mean_and_the_largest_are() -> None:
    shapes = [Shape((10, 4, 6), (3, 1), targets=8, patches=16), Shape((40, 2), (2,), targets=2, patches=0)]
    rows = Workload(shapes, 2, "")
    assert (rows.largest.tokens, rows.largest.blocks, rows.largest.single_columns) == (44, 2, 2)
    assert (rows.largest.past, rows.largest.targets, rows.largest.patches) == (41, 8, 16)
    assert (rows.mean.tokens, rows.mean.targets) == (34, 5)
    # The first row's second block starts 4 columns after the third latent, with a lead of 40.
    assert rows.largest_of(1).tokens == 44
    assert rows.largest_of(2).tokens == 40 + 3 + 4 + 1 + 6
    # Rows that would be padded by more than the passes of all of them cost are not aligned.
    far = [Shape(stretches, (4,), targets=8, patches=16) for stretches in ((6000, 100), (100, 6000))]
    assert Workload(far, 2, "").largest_of(2).tokens == 6104 + 96 * 4


def entry(**facts: object) -> IndexEntry:
    place = {"key": "a", "shard": 0, "offset": 0, "size": 0, "input_sizes": [], "helper_sizes": [], "image_blocks": 0}
    return IndexEntry(**(place | {"question_chars": 30, "answer_chars": 90} | facts))


def measured(stage: str, each: IndexEntry, max_length: int | None = None, *, sees_image: bool = True) -> Shape:
    config = Config.model_validate(
        {
            "run": {"dir": "unused"},
            "model": {"path": "unused", "latent_size": 4, "answer_sees_image": sees_image},
            "data": {"shards": "unused", "max_length": max_length},
            "train": {"stage": stage, "max_steps": 1, "warmup_steps": 0},
        }
    )
    (shape,) = measure(Index.of([each]), np.zeros(1, np.int64), config, ImageProcessor(Qwen2VLImageProcessorPil()))
    return shape.at(0)


def test_each_stage_has_the_columns_of_its_latents() -> None:
    """30 of the template, 10 and 30 of text; 2 markers for each block; in text no latents; in stage 1 one pass."""
    configured, own = entry(latent_blocks=2), entry(latent_blocks=2, latent_sizes=[2, 8])
    assert measured("text", own).row().tokens == 70
    for stage in ("stage1", "stage2"):
        assert measured(stage, configured).row().tokens == 70 + 2 * (4 + 2)
        assert measured(stage, own).row().tokens == 70 + 2 + 8 + 2 * 2
    assert measured("stage1", own).latent_sizes == ()
    assert measured("stage2", own).latent_sizes == (2, 8)
    assert measured("stage2", entry(latent_blocks=0)).stretches == (40, 30)  # its question, its answer
    assert measured("text", own).targets == 30
    assert measured("stage2", own).targets == 30 + 4


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_hidden_images_begin_one_pass_more_and_add_no_column(stage: str) -> None:
    for each, passes in (
        (entry(latent_blocks=1), {"stage1": 2, "stage2": 6}),
        (entry(latent_blocks=2, latent_sizes=[2, 8]), {"stage1": 2, "stage2": 12}),
        (entry(latent_blocks=0), {"stage1": 1, "stage2": 1}),
    ):
        seen, hidden = measured(stage, each).row(), measured(stage, each, sees_image=False).row()
        assert hidden.tokens == seen.tokens
        assert 1 + hidden.latents == passes[stage]


@pytest.mark.parametrize("stage", ["text", "stage1", "stage2"])
def test_no_row_is_longer_than_allowed(stage: str) -> None:
    """Text is an estimate and so shortened, latents are exact."""
    shape = measured(stage, entry(latent_blocks=2, latent_sizes=[2, 8]), max_length=45)
    assert shape.row().tokens == 45
    assert shape.latent_sizes == ((2, 8) if stage == "stage2" else ())
    assert min(shape.stretches) >= 0
