"""Helper-image patch embeddings to latent targets, in plain torch: the definition.

    n = patches of an image, K = its latents, g = n // K
    target_k = mean(patch_embeds[k * g : (k + 1) * g]),  k = 0 .. K-1

in float32. The last n - K * g patches are dropped, as the reference implementation does
(UMass-Embodied-AGI/Mirage at 53f26de, modeling_qwen2_5_vl.py:2089-2143).
"""

import torch


def latent_pool(patch_embeds: torch.Tensor, num_patches: list[int], latent_sizes: list[int]) -> torch.Tensor:
    """Pools each image's patch embeddings to its latents.

    Args:
        patch_embeds: [P, D], merged patches of all images, one image after the other, each in raster order.
        num_patches: patches of each image; their sum is P.
        latent_sizes: K of each image; at most its patches.

    Returns:
        [sum of K, D] float32.

    Raises:
        ValueError: the numbers do not fit together.
    """
    if len(num_patches) != len(latent_sizes) or sum(num_patches) != patch_embeds.shape[0]:
        raise ValueError(f"{patch_embeds.shape[0]} patches, but images of {num_patches} with K {latent_sizes}")
    if any(not 1 <= size <= patches for patches, size in zip(num_patches, latent_sizes, strict=True)):
        raise ValueError(f"K must lie in 1..patches for each image: patches {num_patches}, K {latent_sizes}")
    pooled = [
        image[: size * (len(image) // size)].float().unflatten(0, (size, -1)).mean(dim=1)
        for image, size in zip(patch_embeds.split(num_patches), latent_sizes, strict=True)
    ]
    return torch.cat(pooled) if pooled else patch_embeds.new_zeros((0, patch_embeds.shape[1]), dtype=torch.float32)
