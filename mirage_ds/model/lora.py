"""LoRA by peft, and the rows of the latent tokens: what is trained of a model whose own weights stay as they are."""

import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import deepspeed
import torch

from mirage_ds.config_lora import ATTENTION, Lora, check_peft
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.trained_rows import EmbeddingRows, HeadRows

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"  # peft's name of the only adapter
EMBEDDINGS, HEAD = "model.language_model.embed_tokens", "lm_head"


def peft_config(lora: Lora, **more: Any) -> "LoraConfig":
    """What peft calls this adapter; `target_modules` leaves out the vision tower, which has layers of the same names.

    Args:
        more: settings for peft beside those of the matrices.

    Raises:
        ConfigError: peft is not installed.
    """
    check_peft()
    from peft import LoraConfig  # an extra

    layer = r"model\.language_model\.layers\.\d+"
    names = [f"{'self_attn' if name in ATTENTION else 'mlp'}\\.{name}" for name in lora.modules]
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft only divides it by the rank
        lora_dropout=0.0,
        target_modules=rf"{layer}\.({'|'.join(names)})",
        task_type="CAUSAL_LM",
        **more,
    )


def add_lora(backbone: Backbone, lora: Lora, latent_ids: Sequence[int], seed: int) -> None:
    """Freezes the model and adds what is trained, in place: A is drawn, B is 0, so that the outputs do not change.

    Under ZeRO-3 each rank makes the same small matrices in full; `deepspeed.initialize` shards them with the rest.

    Args:
        seed: of A, the same on every device and for every number of ranks.

    Raises:
        ConfigError: peft is not installed.
    """
    adapter, hf = peft_config(lora), backbone.hf
    from peft import inject_adapter_in_model

    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, that embeddings and head are tied
        torch.manual_seed(seed)
        inject_adapter_in_model(adapter, hf, ADAPTER)
    if lora.train_embeddings == "all":
        backbone.embed_tokens.weight.requires_grad_(True)
        backbone.head_weight.requires_grad_(True)
    if lora.train_embeddings == "latent_rows":
        add_latent_rows(backbone, list(latent_ids))


def add_latent_rows(backbone: Backbone, ids: list[int]) -> None:
    """Embeddings and head whose rows of these tokens are parameters of their own, one for both where they are tied."""
    hf, tied = backbone.hf, backbone.tied
    embeddings, head = backbone.embed_tokens, hf.lm_head
    rows = _copy_rows(backbone.embed_tokens.weight, ids)
    hf.model.language_model.embed_tokens = EmbeddingRows(embeddings, rows, ids)
    hf.lm_head = HeadRows(head, rows if tied else _copy_rows(head.weight, ids), ids)


def _copy_rows(weight: torch.Tensor, ids: list[int]) -> torch.nn.Parameter:
    with deepspeed.zero.GatheredParameters([weight]):
        return torch.nn.Parameter(weight.detach()[ids].clone())


def plain_name(name: str) -> str:
    """transformers' name of a parameter of the base, from its name beside an adapter."""
    return name.replace(".base_layer.", ".")


def matrix_of(name: str) -> str | None:
    """A or B, if a parameter of this name is one of an adapter's matrices."""
    found = re.fullmatch(rf".*\.lora_([AB])\.{ADAPTER}\.weight", name)
    return found[1] if found else None


def has_adapter(module: torch.nn.Module) -> bool:
    """Whether an adapter is trained, so that checkpoints leave out what is frozen: its base."""
    return any(matrix_of(name) for name, _ in module.named_parameters())


def scaling(lora: Lora) -> float:
    """What B A is multiplied by."""
    return lora.alpha / lora.rank
