"""Which kernels compute the attention: FlashAttention 2 where it can run, else torch's sdpa."""

from importlib import import_module
from importlib.util import find_spec

import torch
from transformers.utils import is_flash_attn_2_available

from mirage_ds.errors import ConfigError


def choose_attention(wanted: str, dtype: torch.dtype, device_type: str) -> tuple[str, str]:
    """Resolves `model.attention`, for a model that is computed on `device_type`.

    Returns:
        `flash_attention_2` or `sdpa`; why it is not FlashAttention 2, if `auto` looked for it.
    Raises:
        ConfigError: flash_attention_2 was requested and cannot run.
    """
    if wanted == "sdpa":
        return "sdpa", ""
    obstacle = flash_obstacle(dtype, device_type)
    if obstacle is None:
        return "flash_attention_2", ""
    if wanted == "flash_attention_2":
        raise ConfigError(
            f"model.attention is flash_attention_2, which cannot run (on this machine): {obstacle}; it needs a GPU, "
            "train.dtype=bf16 and the package flash-attn, built for this torch; install flash-attn, or set "
            "model.attention=auto or sdpa"
        )
    return "sdpa", obstacle


def flash_obstacle(dtype: torch.dtype, device_type: str) -> str | None:
    """Why FlashAttention 2 cannot run; None if it can."""
    if device_type != "cuda":
        return "flash-attn needs a GPU"
    if dtype != torch.bfloat16:
        return "flash-attn needs bf16"
    if find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    try:
        import_module("flash_attn")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:  # as of a build for another torch or CUDA
        return f"flash-attn cannot be imported: {type(error).__name__}: {error}"
    if not is_flash_attn_2_available():
        return "transformers does not accept the installed flash-attn; it accepts 2.3.3 and newer"
    return None
