"""Random encoded samples for the golden set's small model: ragged in every way that real rows are."""

from collections.abc import Sequence

import torch

from mirage_ds.data.encode import EncodedSample
from mirage_ds.tokens import IGNORE_INDEX

VOCAB, IMAGE, PAD, START, END = 900, 5, 997, 998, 999
PATCH_BYTES = 588
PIXEL_LEVELS = torch.tensor([[0.4814], [0.4578], [0.4082]]).neg().add(torch.arange(256) / 255).div(0.27)
"""About those of Qwen2.5-VL: another mean for each color."""


def random_sample(
    seed: int,
    *,
    stage: str,
    latent_size: int | Sequence[int] = 4,
    images: int = 1,
    latents: bool = True,
    labels: bool = True,
) -> EncodedSample:
    """A question of text and images, an answer of text, latent blocks and text between; sizes drawn from the seed.

    Args:
        latent_size: K of the latent block, or of each.
        latents: whether the answer has latents.
    """
    draw = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=draw))

    def text(low: int, high: int) -> list[int]:
        return torch.randint(10, VOCAB, (number(low, high),), generator=draw).tolist()

    grids = [[1, 2 * number(1, 3), 2 * number(1, 4)] for _ in range(images)]
    prompt = text(3, 8)
    for _, height, width in grids:
        prompt += [3, *[IMAGE] * (height * width // 4), 4, *text(1, 3)]
    sizes = [latent_size] if isinstance(latent_size, int) else list(latent_size)
    sizes = sizes if latents and stage != "text" else []
    answer = text(1, 6)
    for block, size in enumerate(sizes):
        answer += (text(1, 6) if block else []) + [START, *[PAD] * size, END]
    input_ids = torch.tensor(prompt + answer + text(2, 8))
    latent_mask, image_mask = input_ids == PAD, input_ids == IMAGE
    supervised = (torch.arange(len(input_ids)) >= len(prompt)) & ~latent_mask if labels else torch.zeros(1).bool()
    helper_grid = [[1, 6, 2 * number(4, 6)] for _ in sizes] if stage == "stage1" else []
    return EncodedSample(
        key=f"random {seed}",
        input_ids=input_ids,
        labels=torch.where(supervised, input_ids, IGNORE_INDEX),
        position_ids=positions(prompt, grids, len(input_ids)),
        image_mask=image_mask,
        latent_mask=latent_mask,
        prompt_length=len(prompt),
        pixel_values=patches(grids, draw),
        image_grid_thw=torch.tensor(grids, dtype=torch.int64).reshape(-1, 3),
        pixel_values_latent=patches(helper_grid, draw),
        image_grid_thw_latent=torch.tensor(helper_grid, dtype=torch.int64).reshape(-1, 3),
        pixel_levels=PIXEL_LEVELS,
        latent_sizes=sizes,
    )


def patches(grids: list[list[int]], draw: torch.Generator) -> torch.Tensor:
    count = sum(height * width for _, height, width in grids)
    return torch.randint(256, (count, PATCH_BYTES), dtype=torch.uint8, generator=draw)


def positions(prompt: list[int], grids: list[list[int]], length: int) -> torch.Tensor:
    """[3, L]: text positions increase by one; the rows and columns of an image count from its start."""
    columns: list[tuple[int, int, int]] = []
    here, remaining, place = 0, list(grids), 0
    while place < length:
        if place < len(prompt) and prompt[place] == IMAGE:
            _, height, width = remaining.pop(0)
            merged = [(here, here + y, here + x) for y in range(height // 2) for x in range(width // 2)]
            columns += merged
            here, place = here + max(height, width) // 2, place + len(merged)
        else:
            columns.append((here, here, here))
            here, place = here + 1, place + 1
    return torch.tensor(columns).T


def ragged_batch(
    seed: int, size: int, *, stage: str, latent_sizes: Sequence[int | Sequence[int]] | None = None
) -> list[EncodedSample]:
    """A global batch; `latent_sizes` gives each sample its K, or that of each of its blocks, and every sample labels.

    Without it, samples lack images, latents or labels at random, or have two blocks.
    """
    if latent_sizes is not None:
        return [
            random_sample(seed * 1000 + place, stage=stage, latent_size=size, images=1 + place % 2)
            for place, size in enumerate(latent_sizes)
        ]
    draw = torch.Generator().manual_seed(seed)
    coins = torch.rand(size, 4, generator=draw)
    return [
        random_sample(
            seed * 1000 + place,
            stage=stage,
            latent_size=[1 + int(coin[3] * 6), 1 + int(coin[2] * 4)][: 1 + int(coin[1] < 0.3)],
            images=int(coin[0] * 3),
            latents=bool(coin[1] < 0.6),
            labels=bool(coin[2] < 0.7),
        )
        for place, coin in enumerate(coins)
    ]
