"""In how many directions the states of several rows lie (Roy and Vetterli 2007), for training and evaluation:

    exp(-sum_k p_k ln p_k), p_k = sigma_k / (sigma_1 + .. + sigma_n), sigma_k the singular values of the matrix [n, D]
    of the states, which are the square roots of the eigenvalues of its Gram matrix [n, n].

The mean is not subtracted: what all rows have in common counts as a direction, so that states that are alike have an
effective rank of 1, and only those, and orthogonal ones of equal norm n.
"""

import torch

EXACT = 1e-12  # what is smaller, relative to the largest eigenvalue of a Gram matrix in float64, is rounding


def effective_rank(grams: torch.Tensor) -> torch.Tensor:
    """The effective ranks [...] of Gram matrices [..., n, n] in float64, n >= 1; a state of zeros does not count.

    Where a matrix is not finite, or zero, it is NaN.
    """
    is_finite = grams.isfinite().flatten(-2).all(dim=-1)
    squares = torch.linalg.eigvalsh(torch.where(is_finite[..., None, None], grams, 0.0))
    largest = squares.amax(dim=-1, keepdim=True)
    singular_values = torch.where(squares > EXACT * largest, squares, 0.0).sqrt()
    shares = singular_values / singular_values.sum(dim=-1, keepdim=True)
    return torch.where(is_finite, torch.special.entr(shares).sum(dim=-1).exp(), torch.nan)
