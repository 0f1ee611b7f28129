"""What samples cost, computed over columns, against plain Python and transformers' own rule for the sizes of images."""

import numpy as np
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mirage_ds.data.columns import Index, IndexEntry
from mirage_ds.data.costs import SampleCosts
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.patch_grid import smart_grids


def test_grids_of_many_sizes_are_those_of_transformers() -> None:
    """Random sizes and limits, and the sizes at which a limit begins to count."""
    draw = np.random.default_rng(0)
    sides = np.concatenate([draw.integers(1, 60, 3000), draw.integers(1, 6000, 6000), 14 * draw.integers(1, 300, 3000)])
    sizes = draw.permutation(np.stack([draw.permutation(sides), sides], axis=1))
    sizes = sizes[sizes.max(axis=1) <= 200 * sizes.min(axis=1)]  # transformers refuses more
    for part in np.array_split(sizes, 40):
        side = int(draw.choice([28, 28, 32, 48]))
        smallest = int(draw.integers(1, 400) * draw.choice([1, side, side**2]))
        largest = smallest + int(draw.integers(0, 400) * draw.choice([1, side, side**2]))
        expected = [smart_resize(height, width, side, smallest, largest) for height, width in part.tolist()]
        assert (side * smart_grids(part, side, smallest, largest)).tolist() == [list(size) for size in expected]


def test_costs_of_random_rows_against_plain_python(image_processor: ImageProcessor) -> None:
    draw = np.random.default_rng(1)

    def sizes(most: int) -> list[tuple[int, int]]:
        return [(int(w), int(h)) for w, h in draw.integers(20, 700, (draw.integers(0, most + 1), 2))]

    entries = []
    for _ in range(300):
        helpers = sizes(3)
        given = draw.integers(1, 9, len(helpers)).tolist() if draw.random() < 0.4 else None
        chars = draw.integers(0, 5000, 2).tolist()
        entries.append(IndexEntry("", 0, 0, 0, sizes(3), helpers, *chars, 0, len(helpers), given or None))

    def tokens(images: list[tuple[int, int]]) -> int:
        resized = [smart_resize(height, width, 28, 3136, 12845056) for width, height in images]
        return sum(height * width // 28**2 for height, width in resized)

    for stage in ("text", "stage1", "stage2"):
        costs = SampleCosts(Index.of(entries), image_processor.image_tokens, stage, 5).all()
        for place, entry in enumerate(entries):
            blocks = [] if stage == "text" else entry.latent_sizes or [5] * len(entry.helper_sizes)
            texts = sum(-(-chars // 3) for chars in (entry.question_chars, entry.answer_chars))
            length = 30 + texts + tokens(entry.input_sizes) + 2 * len(entry.input_sizes) + sum(blocks) + 2 * len(blocks)
            patches = 4 * (tokens(entry.input_sizes) + (tokens(entry.helper_sizes) if stage == "stage1" else 0))
            assert costs.tokens[place] == length
            assert costs.costs[place] == 25 * length + patches
            assert costs.passes[place] == (sum(blocks) if stage == "stage2" else 0)
