"""Pools helper-image patch embeddings to latents, in plain torch: the definition that tests and benchmarks share.

For segment s with the rows R_s = index[begin_s : end_s] of patch_embeds (without an index: the rows begin_s .. end_s),

    target_s = 1 / |R_s| * sum of patch_embeds[r] over r in R_s        float32
    input_s = target_s in out_dtype
    inverse_norm_s = 1 / max(||target_s||, EPS)                        float32

It sums in float32, or in float64 if patch_embeds is float64, so that tests can compare with exact sums.
"""

import torch

EPS = 1e-8
"""Lower bound of a target's norm in its inverse, as in torch.nn.functional.cosine_similarity."""


def latent_pool(
    patch_embeds: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition above.

    Args:
        patch_embeds: [P, D].
        bounds: [N, 2] int64, on the host; no segment is empty.
        index: [M] int64, on the host, or None.
        out_dtype: of the inputs.

    Returns:
        Inputs [N, D] in out_dtype, targets [N, D], inverse norms [N].
    """
    dtype = torch.promote_types(patch_embeds.dtype, torch.float32)
    segments = [slice(begin, end) if index is None else index[begin:end] for begin, end in bounds.tolist()]
    targets = torch.stack([patch_embeds[rows].to(dtype).mean(dim=0) for rows in segments])
    return targets.to(out_dtype, copy=True), targets, 1 / targets.norm(dim=1).clamp_min(EPS)


def mean_backward(
    mean_grads: torch.Tensor, bounds: torch.Tensor, index: torch.Tensor | None, num_rows: int
) -> torch.Tensor:
    """Gradients [N, D] of each segment's mean -> those of the rows [num_rows, D], summed over a row's segments."""
    grad = mean_grads.new_zeros((num_rows, mean_grads.shape[1]))
    for mean_grad, (begin, end) in zip(mean_grads, bounds.tolist(), strict=True):
        rows = torch.arange(begin, end) if index is None else index[begin:end]
        grad.index_add_(0, rows, (mean_grad / (end - begin)).expand(end - begin, -1))
    return grad
