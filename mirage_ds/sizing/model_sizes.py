"""The size of a model by part, counted on the unmodified transformers model, built without weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mirage_ds.config import ModelConfig
from mirage_ds.errors import ConfigError
from mirage_ds.model.backbone import Backbone, described_model, empty_model
from mirage_ds.model.lora import matrix_of
from mirage_ds.model.trained import choose_trained


@dataclass(frozen=True)
class Parts:
    """Elements of parameters by part of the model."""

    tower: tuple[int, ...]
    embedding: tuple[int, ...]
    layers: tuple[int, ...]  # of all layers
    norm: tuple[int, ...]
    head: tuple[int, ...]  # empty if the head is tied to the embedding

    @property
    def rollout(self) -> tuple[int, ...]:
        """The module that `model.gather=rollout` gathers at once, without a tied embedding."""
        return self.layers + self.norm + self.head

    @property
    def language(self) -> tuple[int, ...]:
        return self.embedding + self.rollout

    @property
    def all(self) -> tuple[int, ...]:
        return self.tower + self.language


@dataclass(frozen=True)
class ModelSizes(Parts):
    """Of every parameter, an adapter's too; and the dimensions that set the size of activations."""

    trained: Parts  # those of the parameters that are trained
    num_layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tower_blocks: int
    tower_full_blocks: int  # with attention over the full image; the others use windows
    tower_hidden: int
    tower_intermediate: int
    tower_window: int  # patches of a window along one side
    # Elements that take part in matrix products: without biases and norms.
    layer_matrices: int  # of all layers; each element once per token
    tower_matrices: int  # of patch embedding and blocks; each element once per patch
    merger_matrices: int  # each element once per merged patch
    # Those of them whose gradients are computed: of all layers, of the head (or 0), of blocks, of the merger.
    trained_layer_matrices: int
    trained_head_matrix: int
    trained_tower_matrices: int
    trained_merger_matrices: int
    adapter_rank: int  # of an adapter: the sum of the ranks of one layer's matrices

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


# From config.json of Qwen/Qwen2.5-VL-*-Instruct on huggingface.co (the 32B and 72B have a wider tower). The sums equal
# the published numbers of parameters: tests/unit/launch/planner/test_planner.py.
TOWER = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "fullatt_block_indexes": [7, 15, 23, 31]}


def text_section(vocab: int, hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """The sizes of a decoder as in the text section of config.json."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


PUBLISHED: dict[str, tuple[dict[str, Any], int, bool]] = {
    "Qwen/Qwen2.5-VL-3B-Instruct": (text_section(151936, 2048, 11008, 36, 16, 2), 3420, True),
    "Qwen/Qwen2.5-VL-7B-Instruct": (text_section(152064, 3584, 18944, 28, 28, 4), 3420, False),
    "Qwen/Qwen2.5-VL-32B-Instruct": (text_section(152064, 5120, 27648, 64, 40, 8), 3456, False),
    "Qwen/Qwen2.5-VL-72B-Instruct": (text_section(152064, 8192, 29568, 80, 64, 8), 3456, False),
}
"""Text settings, the tower's intermediate size, whether the head is tied to the embedding."""


def model_sizes(model: ModelConfig) -> ModelSizes:
    """Sizes of a model folder, a published model, or a cached hub id.

    Raises:
        ConfigError: `model.path` is none of these, or see `choose_trained`.
    """
    if model.path in PUBLISHED:
        text, tower_intermediate, tied = PUBLISHED[model.path]
        vision = TOWER | {"intermediate_size": tower_intermediate, "out_hidden_size": text["hidden_size"]}
        return count(_marked(described_model(text, vision, tied=tied), model))
    if not Path(model.path).is_dir() and model.path.startswith(("/", ".", "~")):
        raise ConfigError(
            f"the model folder does not exist (model.path={model.path}); allowed: a folder, or one of "
            f"{', '.join(PUBLISHED)}, whose sizes are known; set model.path to the one of the same size"
        )
    return count(_marked(empty_model(model.path, model.cache_dir), model))


def _marked(hf: Any, model: ModelConfig) -> Any:
    """The model without weights, with the adapter that the run trains, and what is trained marked."""
    choose_trained(Backbone(hf, attention=""), model, latent_ids=range(3), seed=0)  # any ids: only shapes are counted
    return hf


def count(hf: Any) -> ModelSizes:
    """Sizes of a transformers model, with or without weights; trained is what requires gradients."""
    backbone = Backbone(hf, attention="")
    text, vision = hf.config.get_text_config(), hf.config.vision_config
    merger = _matrices(hf.model.visual.merger.parameters())
    parts = {
        "tower": list(backbone.visual.parameters()),
        "embedding": list(backbone.embed_tokens.parameters()),
        "layers": list(backbone.layers.parameters()),
        "norm": list(backbone.norm.parameters()),
        "head": [] if backbone.tied else list(hf.lm_head.parameters()),
    }
    trained = {name: [each for each in some if each.requires_grad] for name, some in parts.items()}
    trained_merger = _matrices(each for each in hf.model.visual.merger.parameters() if each.requires_grad)
    return ModelSizes(
        **{name: _numels(some) for name, some in parts.items()},
        trained=Parts(**{name: _numels(some) for name, some in trained.items()}),
        num_layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        vocab=text.vocab_size,
        tower_blocks=vision.depth,
        tower_full_blocks=len(vision.fullatt_block_indexes),
        tower_hidden=vision.hidden_size,
        tower_intermediate=vision.intermediate_size,
        tower_window=vision.window_size // vision.patch_size,
        layer_matrices=_matrices(backbone.layers.parameters()),
        tower_matrices=_matrices(backbone.visual.parameters()) - merger,
        merger_matrices=merger,
        trained_layer_matrices=_matrices(trained["layers"]),
        trained_head_matrix=backbone.head_weight.numel() if backbone.head_weight.requires_grad else 0,
        trained_tower_matrices=_matrices(trained["tower"]) - trained_merger,
        trained_merger_matrices=trained_merger,
        adapter_rank=sum(
            weight.shape[0] for name, weight in backbone.layers[0].named_parameters() if matrix_of(name) == "A"
        ),
    )


def _numels(parameters: Iterable[torch.Tensor]) -> tuple[int, ...]:
    return tuple(parameter.numel() for parameter in parameters)


def _matrices(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.dim() > 1)
