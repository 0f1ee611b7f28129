"""Loads an unmodified Qwen2.5-VL and gives access to the parts that MirageModel is built from.

The only file that names transformers' Qwen model classes.
"""

import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    DynamicCache,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.utils.hub import cached_file

from mirage_ds.config import Dtype
from mirage_ds.errors import MALFORMED, ConfigError
from mirage_ds.model.attention import choose_attention
from mirage_ds.model.trained_rows import EmbeddingRows, HeadRows
from mirage_ds.model_folder import check_model, check_not_quantized
from mirage_ds.tokens import TokenIds

# transformers' names of parameters -> their names in files, as on the hub, which every version of transformers reads.
FILE_NAMES = {"model.visual.": "visual.", "model.language_model.": "model.", "lm_head.": "lm_head."}

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW_MULTIPLE = 64  # of embeddings and head: efficient for matrix products; the real models also have spare rows


@dataclass
class Backbone:
    """A Qwen2.5-VL and its parts (the same modules, not copies)."""

    hf: PreTrainedModel
    attention: str
    no_flash: str = ""  # why `attention` is not FlashAttention 2, if that was looked for

    @property
    def visual(self) -> torch.nn.Module:
        return self.hf.model.visual

    @property
    def embed_tokens(self) -> torch.nn.Embedding | EmbeddingRows:
        return self.hf.model.language_model.embed_tokens

    @property
    def layers(self) -> torch.nn.ModuleList:
        return self.hf.model.language_model.layers

    @property
    def norm(self) -> torch.nn.Module:
        return self.hf.model.language_model.norm

    @property
    def rotary_emb(self) -> torch.nn.Module:
        return self.hf.model.language_model.rotary_emb

    @property
    def head_weight(self) -> torch.nn.Parameter:
        return self.hf.lm_head.weight

    @property
    def head_rows(self) -> HeadRows | None:
        """The head, if some of its rows are parameters of their own."""
        return self.hf.lm_head if isinstance(self.hf.lm_head, HeadRows) else None

    @property
    def tied(self) -> bool:
        """The head's weight is the embedding's."""
        return self.head_weight is self.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.embed_tokens.weight.device

    def step(
        self, embeds: torch.Tensor, position_ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache
    ) -> torch.Tensor:
        """One step of decoding: inputs [B, Q, D] -> hidden state after the final norm of each row's last column [B, D].

        Args:
            position_ids: [3, B, Q].
            mask: [B, columns so far and Q more] bool.
            cache: keys and values of the columns so far; this step adds its own.
        """
        output = self.hf.model.language_model(
            inputs_embeds=embeds,
            position_ids=position_ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]

    def to(self, device: str) -> None:
        """Moves the model."""
        torch.nn.Module.to(self.hf, device)

    def describe(self) -> str:
        """Dtype, device and attention, for the log."""
        dtype = str(self.embed_tokens.weight.dtype).removeprefix("torch.")
        return f"{dtype} on {self.device}, attention {self.describe_attention()}"

    def describe_attention(self) -> str:
        """The attention, and why it is not FlashAttention 2."""
        return self.attention + (f" ({self.no_flash})" if self.no_flash else "")

    @property
    def vocab_size(self) -> int:
        return self.hf.config.text_config.vocab_size


def load_backbone(
    path: str,
    *,
    dtype: torch.dtype,
    device_type: str = "cpu",
    attention: str = "auto",
    cache_dir: Path | None = None,
    deepspeed_config: dict[str, Any] | None = None,
) -> Backbone:
    """Loads a folder or hub id.

    Args:
        device_type: where the model will be computed, `cuda` or `cpu`; it decides the attention.
        deepspeed_config: under ZeRO-3 the weights are sharded while they are loaded, so that no rank ever holds the
            full model; the process group must be initialized.

    Raises:
        ConfigError: the model is not a Qwen2.5-VL, cannot be found, is incomplete, or has settings that the rollout
            does not support.
    """
    check_config(path, cache_dir)
    implementation, no_flash = choose_attention(attention, dtype, device_type)
    # torch prefers cuDNN's sdpa on H100 and B200, which makes a plan for each new shape, and stage 2 and decoding have
    # new shapes all the time (https://github.com/modelscope/FunASR/issues/3704: about a second each).
    torch.backends.cuda.enable_cudnn_sdp(False)
    zero3 = None
    if deepspeed_config is not None:
        from transformers.integrations import HfDeepSpeedConfig  # imports DeepSpeed, which decoding does not need

        zero3 = HfDeepSpeedConfig(deepspeed_config)  # transformers shards while loading only as long as it exists
    hf = load_complete(path, dtype=dtype, attn_implementation=implementation, cache_dir=cache_dir)
    del zero3
    hf.model.visual.requires_grad_(False)
    hf.train()
    return Backbone(hf, implementation, no_flash)


def load_complete(path: str, **settings: Any) -> Any:
    """The model with all its weights.

    Raises:
        ConfigError: a weight is missing, which transformers would initialize randomly, or has another shape, or a file
            is damaged.
    """
    load: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained
    remedy = "copy the folder again"
    try:
        # A weight of another shape is reported below, by its name.
        model, loading = load(path, output_loading_info=True, ignore_mismatched_sizes=True, **settings)
    except (*MALFORMED, SafetensorError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(
            f"the weights cannot be loaded ({path}): {error}; a model folder must have the files that its "
            f"config.json and its index name, complete; {remedy}"
        ) from error
    except RuntimeError as error:  # under ZeRO-3, transformers raises for another shape
        if not (mismatch := re.search("size mismatch for (.*)", str(error))):
            raise
        raise _another_shape(path, mismatch[1]) from error
    if mismatched := sorted(loading["mismatched_keys"]):
        name, found, expected = mismatched[0]
        raise _another_shape(path, f"{name}: {list(found)} in the files, {list(expected)} by config.json")
    if missing := sorted(loading["missing_keys"]):
        raise ConfigError(
            f"missing weights: {len(missing)}, for example {missing[0]} ({path}); a model must have all weights that "
            f"its config.json describes; {remedy}"
        )
    return model


def _another_shape(path: str, example: str) -> ConfigError:
    return ConfigError(
        f"weights of another shape, for example {example} ({path}); files and config.json must agree: vocab_size is "
        "the number of rows, those of added tokens too; correct config.json, or copy the folder again"
    )


def check_config(path: str, cache_dir: Path | None = None) -> None:
    """Refuses a model that is not a Qwen2.5-VL, or that the rollout would not compute exactly.

    Raises:
        ConfigError: it cannot be loaded, or is another model, or quantized, or has attention dropout or sliding-window
            attention.
    """
    remedy = "name a Qwen2.5-VL"
    check_model(path, f"model {path}", cache_dir)
    try:
        config = AutoConfig.from_pretrained(path, cache_dir=cache_dir)
    except (*MALFORMED, StrictDataclassError) as error:
        here = "" if Path(path).is_dir() else f"there is no such folder in {Path.cwd()}, and from the hub: "
        raise ConfigError(
            f"the model cannot be loaded ({path}): {here}{error}; expected a Hugging Face folder or hub id; {remedy}"
        ) from error
    if not isinstance(config, Qwen2_5_VLConfig):
        raise ConfigError(f"the model is a {config.model_type} ({path}); only qwen2_5_vl can be trained; {remedy}")
    check_not_quantized(getattr(config, "quantization_config", None), path)
    text = config.get_text_config()
    if text.attention_dropout:
        raise ConfigError(
            f"the model drops attention weights (attention_dropout={text.attention_dropout} in {path}/config.json); "
            "only 0 is supported, as a step draws no random numbers: layers that are recomputed would drop others; set "
            "attention_dropout to 0.0 there, as in Qwen2.5-VL's own checkpoints"
        )
    if "sliding_attention" in text.layer_types:
        raise ConfigError(
            f"the model uses sliding-window attention (use_sliding_window in {path}/config.json); only full attention "
            "is supported; set use_sliding_window to false there, as in Qwen2.5-VL's own checkpoints"
        )
    try:
        _without_weights(config)
    except MALFORMED as error:
        raise ConfigError(
            f"config.json describes no model ({path}): {error!r}; expected the numbers of a Qwen2.5-VL; {remedy}"
        ) from error


def empty_model(path: str, cache_dir: Path | None = None) -> PreTrainedModel:
    """A model without weights, on torch's meta device: its config, and the names and shapes of its parameters.

    Raises:
        ConfigError: see `check_config`.
    """
    check_config(path, cache_dir)
    return _without_weights(AutoConfig.from_pretrained(path, cache_dir=cache_dir))


def described_model(text: dict[str, Any], vision: dict[str, Any], *, tied: bool) -> PreTrainedModel:
    """As `empty_model`, from the text and vision sections of a config.json that is not available."""
    return _without_weights(Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied))


def _without_weights(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(config)


def file_name(name: str) -> str:
    """A parameter's name in a file of weights, from its name in transformers' model."""
    prefix = next(prefix for prefix in FILE_NAMES if name.startswith(prefix))
    return FILE_NAMES[prefix] + name.removeprefix(prefix)


def has_file(path: str, name: str, cache_dir: Path | None = None) -> bool:
    """Whether a folder or hub id has a file of this name."""
    try:
        return cached_file(path, name, cache_dir=cache_dir) is not None
    except OSError:  # transformers raises it if there is no such file
        return False


def check_latent_ids(ids: TokenIds, backbone: Backbone, path: str) -> None:
    """Refuses a tokenizer whose latent tokens have no row in the embeddings.

    Raises:
        ConfigError: an id is too large.
    """
    largest = max(ids.latent_pad, ids.latent_start, ids.latent_end)
    if largest >= backbone.vocab_size:
        raise ConfigError(
            f"the latent token id {largest} has no embedding ({path}): the model has {backbone.vocab_size} rows; every "
            "id of the tokenizer must be below that; use a folder with more rows, which "
            f"`mirage init --from {path} --output FOLDER` writes"
        )


def random_model(vocab_size: int, ids: TokenIds, seed: int) -> PreTrainedModel:
    """A small Qwen2.5-VL with random float32 weights: hidden 128, 4 layers, a tower of 2 blocks.

    The weights' standard deviation is 0.08, near 128 ** -0.5. With 0.02, which suits widths of thousands, such a small
    model learns more slowly (docs/results.md).
    """
    vision = {
        "initializer_range": 0.08,
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 4,
        "out_hidden_size": 128,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 112,
        "fullatt_block_indexes": [1],
    }
    text = {
        "initializer_range": 0.08,
        "vocab_size": vocab_size,
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids.end_of_text,
        "eos_token_id": ids.im_end,
        "pad_token_id": ids.end_of_text,
    }
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=ids.image_pad,
        video_token_id=ids.video_pad,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2_5_VLForConditionalGeneration(config)
