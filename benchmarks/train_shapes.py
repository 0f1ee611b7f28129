"""Models and rows of the training benchmark: random weights, tokens and pixels, the same in every run.

A row has the form of real ones: an image, a question, the start of the answer, K latents, the rest of the answer.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from mirage_ds.batch import MERGE_SIZE, Batch, Grid
from mirage_ds.config import Config, DataConfig, Dtype, ModelConfig, RunConfig, Stage, TrainConfig
from mirage_ds.data.collate import collate
from mirage_ds.data.encode import EncodedSample
from mirage_ds.model.backbone import Backbone
from mirage_ds.model.mirage import MirageModel
from mirage_ds.sizing.model_sizes import PUBLISHED, TOWER, text_section
from mirage_ds.tokens import IGNORE_INDEX

PATCH_BYTES = 588
LEAD_TARGETS = 20  # supervised tokens before the latents, at most


@dataclass(frozen=True)
class Widths:
    """The sections `text_config` and `vision_config` of a config.json."""

    text: dict[str, Any]
    vision: dict[str, Any]


@dataclass(frozen=True)
class RowShape:
    """The size of one row; its helper image, in stage 1, is as large as its image."""

    grid: Grid  # rows and columns of the image's merged patches
    tokens: int  # columns, those of the image and the latents too
    targets: int  # supervised tokens: the answer, which ends the row, without the latents in it
    latent_size: int

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]


def seven_b(layers: int) -> Widths:
    """Qwen2.5-VL-7B with fewer decoder layers; its tower is complete."""
    text, tower_intermediate, _ = PUBLISHED["Qwen/Qwen2.5-VL-7B-Instruct"]
    vision = TOWER | {"intermediate_size": tower_intermediate, "out_hidden_size": text["hidden_size"]}
    return Widths(text | {"num_hidden_layers": layers}, vision)


def tiny(layers: int, vocab: int) -> Widths:
    """To test the benchmark itself."""
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    return Widths(text_section(vocab, 64, 96, layers, 4, 2), vision | {"out_hidden_size": 64})


def make_hf(widths: Widths, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model with random weights, its tower frozen."""
    head_dim = widths.text["hidden_size"] // widths.text["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 1_000_000.0, "mrope_section": mrope_section(head_dim)}
    no_ids = dict.fromkeys(
        ("bos_token_id", "eos_token_id", "pad_token_id")
    )  # the default ones exceed small vocabularies
    config = Qwen2_5_VLConfig(
        text_config=widths.text | no_ids | {"rope_parameters": rope},
        vision_config=widths.vision,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with device:
        hf = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=dtype, attn_implementation="sdpa")
    hf.model.visual.requires_grad_(False)
    return hf.train()


def mrope_section(head_dim: int) -> list[int]:
    """Frequencies of time, height and width: Qwen2.5-VL's 16, 24 and 24 of 64, in proportion."""
    time = head_dim // 8
    height = (head_dim // 2 - time) // 2
    return [time, height, head_dim // 2 - time - height]


def make_config(stage: Stage, rows: int, latent_size: int, dtype: Dtype, *, recompute: bool) -> Config:
    """The configuration of a run of such micro-batches; it has neither a model folder nor shards."""
    return Config(
        run=RunConfig(dir=Path("unused")),
        model=ModelConfig(
            path="unused", latent_size=latent_size, activation_checkpointing="full" if recompute else "none"
        ),
        data=DataConfig(shards=Path("unused")),
        train=TrainConfig(stage=stage, max_steps=1, warmup_steps=0, micro_batch_size_per_gpu=rows, dtype=dtype),
    )


def make_model(hf: Any, attention: str, config: Config) -> MirageModel:
    """MirageModel on the modules of `hf`."""
    hf.set_attn_implementation(attention)
    return MirageModel(
        Backbone(hf, attention),
        stage=config.train.stage,
        ce_loss_weight=config.train.text_weight,
        latent_loss_weight=config.train.latent_loss_weight,
        recompute=config.model.activation_checkpointing == "full",
    )


def make_batch(rows: Sequence[EncodedSample], stage: Stage, device: torch.device) -> Batch:
    return collate(rows, align_latents=stage == "stage2").to(device)


def make_row(seed: int, shape: RowShape, vocab: int, stage: Stage) -> EncodedSample:
    """A row of exactly this shape: a marker, the image, the question, the answer with the latents in it.

    Raises:
        ValueError: the shape has no room for its image and answer.
    """
    draw = torch.Generator().manual_seed(seed)
    latents = 0 if stage == "text" else shape.latent_size
    prompt = shape.tokens - shape.targets - latents
    if prompt < shape.cells + 2:
        raise ValueError(f"{shape} has no room for its image, its marker and a question")
    columns = torch.arange(shape.tokens)
    lead = prompt + min(LEAD_TARGETS, shape.targets // 3)
    latent_mask = (columns >= lead) & (columns < lead + latents)
    input_ids = torch.randint(0, vocab, (shape.tokens,), generator=draw)
    patches = shape.cells * MERGE_SIZE**2
    helpers = int(stage == "stage1")
    grid_thw = torch.tensor([[1, shape.grid[0] * MERGE_SIZE, shape.grid[1] * MERGE_SIZE]])
    return EncodedSample(
        key=f"row {seed}",
        input_ids=input_ids,
        labels=torch.where((columns >= prompt) & ~latent_mask, input_ids, IGNORE_INDEX),
        position_ids=position_ids(shape),
        image_mask=(columns >= 1) & (columns <= shape.cells),
        latent_mask=latent_mask,
        prompt_length=prompt,
        pixel_values=torch.randint(256, (patches, PATCH_BYTES), dtype=torch.uint8, generator=draw),
        image_grid_thw=grid_thw,
        pixel_values_latent=torch.randint(256, (helpers * patches, PATCH_BYTES), dtype=torch.uint8, generator=draw),
        image_grid_thw_latent=grid_thw[:helpers],
        pixel_levels=torch.linspace(-2, 2, 256).expand(3, -1),
        latent_sizes=[latents] if latents else [],
    )


def position_ids(shape: RowShape) -> torch.Tensor:
    """[3, L]: the image begins at column 1; text continues after the larger side of the image."""
    rows, columns = shape.grid
    image = [(1, 1 + row, 1 + column) for row in range(rows) for column in range(columns)]
    after = 1 + max(shape.grid)
    text = ((after + place,) * 3 for place in range(shape.tokens - 1 - len(image)))
    return torch.tensor(list(chain([(0, 0, 0)], image, text))).T


def varied(shape: RowShape) -> Iterator[RowShape]:
    """Other images and lengths without end; sides of images are up to a quarter shorter."""
    draw = random.Random(0)
    while True:
        rows, columns = (draw.randint(side - side // 4, side) for side in shape.grid)
        question = draw.randint(1, shape.tokens - shape.cells - shape.targets - shape.latent_size - 1)
        tokens = 1 + rows * columns + question + shape.targets + shape.latent_size
        yield RowShape((rows, columns), tokens, shape.targets, shape.latent_size)
