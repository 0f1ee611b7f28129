"""M-RoPE positions: three coordinates per token, on a grid for the tokens of an image.

Shape legend: L tokens, N images.
"""

import torch


def mrope_positions(image_mask: torch.Tensor, grid_thw: torch.Tensor, merge_size: int) -> torch.Tensor:
    """M-RoPE positions [3, L]: grid coordinates for an image's tokens; text positions for all others, also for latents.

    After an image the position advances by max(height, width) of its merged grid, whatever its number of tokens.

    Args:
        image_mask: [L] bool, True at image pads; images are runs of pads with a token between them.
        grid_thw: [N, 3] int64, in patches.
    """
    position_ids = torch.empty(3, len(image_mask), dtype=torch.int64)
    run_starts = image_mask & ~torch.cat([image_mask.new_zeros(1), image_mask[:-1]])
    starts = run_starts.nonzero().flatten().tolist()
    column = position = 0
    for start, (time, height, width) in zip(starts, grid_thw.tolist(), strict=True):
        position_ids[:, column:start] = torch.arange(position, position + start - column)
        position += start - column
        sides = [torch.arange(size) for size in (time, height // merge_size, width // merge_size)]
        grid = torch.stack(torch.meshgrid(*sides, indexing="ij")).flatten(1)
        column = start + grid.shape[1]
        position_ids[:, start:column] = position + grid
        position += max(height, width) // merge_size
    position_ids[:, column:] = torch.arange(position, position + len(image_mask) - column)
    return position_ids
