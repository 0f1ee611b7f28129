"""Decodes with latents: in batches, with a KV cache; every row enters and leaves latent mode by itself.

A row that emits <|latent_start|> enters latent mode: each next input is its own hidden state after the final norm,
emitted as <|latent_pad|>, until the block ends with <|latent_end|>. Then text follows, and perhaps another block.
`Decoder.feed` can replace the states (feed.py). From the end of its first block on, nothing of a row attends to its
images if the model was trained so (`model.answer_sees_image`).

    latent_end: fixed   the block ends after K states
    latent_end: model   the block ends where the model would choose <|latent_end|>, at the latest after K states

The reference decodes with `model` and 8 (transformers' generation/utils.py:3286-3424 in UMass-Embodied-AGI/Mirage at
53f26de), but moves all rows of a batch in and out of latent mode together, and may never end a second block.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from mirage_ds.batch import Batch
from mirage_ds.config import LatentEnd
from mirage_ds.data.encode import Encoder, load_encoder
from mirage_ds.errors import ConfigError
from mirage_ds.inference.feed import Feed, Slot
from mirage_ds.inference.sampling import GREEDY, Sampling
from mirage_ds.model.backbone import Backbone, check_config, check_latent_ids, load_backbone
from mirage_ds.model.latent_settings import LatentSettings, LatentTokenIds, read_latent_settings
from mirage_ds.model.targets import build_inputs_embeds
from mirage_ds.model.tower import Tower
from mirage_ds.self_check import check_decoding
from mirage_ds.tokens import TokenIds


class Emission(NamedTuple):
    """One row's part of one step."""

    token: int
    latent: torch.Tensor | None  # [D]: the state that is fed instead of the token's embedding
    replaced: bool  # the state is not the row's own


@dataclass
class Generation:
    """What one row emitted."""

    ids: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)  # each [D]: the states that were fed, in order
    num_replaced: int = 0  # of them: not the row's own


@dataclass
class Decoder:
    """Decodes with one model."""

    backbone: Backbone
    ids: TokenIds
    latent_size: int
    latent_end: LatentEnd = "fixed"
    max_new_tokens: int = 1024
    sampling: Sampling = GREEDY
    feed: Feed | None = None
    """What is fed at the latents; None: the model's own states."""
    forbidden: tuple[int, ...] = ()
    """Tokens that are never chosen."""
    answer_sees_image: bool = True
    """Whether a row attends to its images from its first <|latent_end|> on."""

    def __post_init__(self) -> None:
        self.backbone.hf.eval()

    def generate(self, batch: Batch) -> list[Generation]:
        """Decodes every row to its end; the arguments are those of `steps`."""
        rows = [Generation() for _ in batch.keys]
        for emissions in self.steps(batch):
            for row, emission in zip(rows, emissions, strict=True):
                if emission is not None:
                    row.ids.append(emission.token)
                    row.latents += [] if emission.latent is None else [emission.latent]
                    row.num_replaced += emission.replaced
        return rows

    @torch.inference_mode()
    def steps(self, batch: Batch) -> Iterator[list[Emission | None]]:
        """Decodes until every row has emitted <|im_end|> or <|endoftext|>, or `max_new_tokens`.

        Args:
            batch: prompts, padded on the left: collate(..., align_latents=True) of encoded prompts.

        Yields:
            For each row what it emits; None once it has ended.

        Raises:
            ConfigError: the model computes something that is not finite.
        """
        batch = batch.to(self.backbone.device)
        generators = [self.sampling.generator(key) for key in batch.keys]
        latent_steps = torch.full((len(generators),), -1)  # states fed in the current block; -1 outside of one
        num_blocks = torch.zeros(len(generators), dtype=torch.int64)  # that were started
        done = torch.zeros(len(generators), dtype=torch.bool)
        cache = DynamicCache()
        mask, image_mask = batch.attention_mask, batch.image_mask
        position = batch.position_ids.amax(dim=(0, 2)) + 1  # [B]: images count as grids, so not the length
        hidden = self.backbone.step(self.prompt_embeds(batch), batch.position_ids, mask, cache)
        for num_emitted in range(1, self.max_new_tokens + 1):
            logits = self.backbone.hf.lm_head(hidden)
            self.check_finite(logits, batch.keys, done)
            if self.forbidden:
                logits[:, self.forbidden] = -torch.inf
            chosen = self.sampling.choose(logits, generators)
            emitted, latent_steps = self.next_tokens(chosen, latent_steps)
            num_blocks += emitted == self.ids.latent_start
            feeds_state = latent_steps > 0
            slots = [
                Slot(block - 1, step - 1) if step > 0 and not ended else None
                for block, step, ended in zip(num_blocks.tolist(), latent_steps.tolist(), done.tolist(), strict=True)
            ]
            fed, replaced = self.states_to_feed(hidden, batch.keys, slots)
            yield [
                None if done[row] else Emission(token, fed[row] if slots[row] else None, replaced[row])
                for row, token in enumerate(emitted.tolist())
            ]
            done |= self.is_end(emitted)
            if done.all() or num_emitted == self.max_new_tokens:
                break
            embeds = self.backbone.embed_tokens(emitted.to(hidden.device))
            embeds = torch.where(feeds_state.to(hidden.device)[:, None], fed, embeds)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if not self.answer_sees_image:
                ends_block = (emitted == self.ids.latent_end).to(mask.device)
                mask[:, : image_mask.shape[1]] &= ~(image_mask & ends_block[:, None])
            hidden = self.backbone.step(embeds[:, None], position.expand(3, -1)[..., None], mask, cache)
            position = position + 1

    @torch.inference_mode()
    def rehearse(self, batch: Batch) -> None:
        """Takes the memory of answers that reach `max_new_tokens`, in two passes: the prompts, and the last token fed.

        Between them the cache grows at once by all tokens before that one; what it then holds is of no use.

        Args:
            batch: as in `steps`.
        """
        batch = batch.to(self.backbone.device)
        cache, num_fed = DynamicCache(), self.max_new_tokens - 1  # nobody sees the last token that is emitted
        hidden = self.backbone.step(self.prompt_embeds(batch), batch.position_ids, batch.attention_mask, cache)
        tokens = self.backbone.hf.lm_head(hidden).argmax(dim=-1)
        if not num_fed:
            return
        layers: list[Any] = cache.layers  # whose type does not say that they have keys and values
        for number, layer in enumerate(layers):
            keys, values = (kept[:, :, :1].expand(-1, -1, num_fed - 1, -1) for kept in (layer.keys, layer.values))
            cache.update(keys, values, number)
        mask = pad(batch.attention_mask, (0, num_fed), value=True)
        position = batch.position_ids.amax(dim=(0, 2)) + num_fed
        embeds = self.backbone.embed_tokens(tokens)[:, None]
        hidden = self.backbone.step(embeds, position.expand(3, -1)[..., None], mask, cache)
        self.backbone.hf.lm_head(hidden)

    def states_to_feed(
        self, hidden: torch.Tensor, keys: Sequence[str], slots: Sequence[Slot | None]
    ) -> tuple[torch.Tensor, list[bool]]:
        """Own states [B, D] -> what is fed where a row has a slot [B, D], and which rows get another state."""
        replaced = [False] * len(keys)
        if self.feed is None:
            return hidden, replaced
        fed = hidden.clone()
        for row, (key, slot) in enumerate(zip(keys, slots, strict=True)):
            state = None if slot is None else self.feed(key, slot, hidden[row])
            if state is not None:
                fed[row], replaced[row] = state, True
        return fed, replaced

    def check_finite(self, logits: torch.Tensor, keys: Sequence[str], done: torch.Tensor) -> None:
        """Refuses to choose from logits [B, V] of which those of a row that continues are not finite.

        Raises:
            ConfigError: the message names the model and the row.
        """
        bad = ~logits.isfinite().all(dim=-1).cpu() & ~done
        if bad.any():
            raise ConfigError(
                f"the model's logits are not finite ({self.backbone.hf.name_or_path}, at {keys[int(bad.nonzero()[0])]})"
                "; expected finite weights, and a dtype whose range they fit; use an earlier checkpoint of the run, or "
                "try --dtype fp32"
            )

    def is_end(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens end an answer."""
        return (tokens == self.ids.im_end) | (tokens == self.ids.end_of_text)

    def next_tokens(self, chosen: torch.Tensor, latent_steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What rows emit when the model chooses `chosen`, and then the steps in their blocks: both [B] int64."""
        inside = latent_steps >= 0
        over = latent_steps >= self.latent_size
        if self.latent_end == "model":
            over |= chosen == self.ids.latent_end
        ends, continues = inside & over, inside & ~over
        emitted = torch.where(ends, self.ids.latent_end, torch.where(continues, self.ids.latent_pad, chosen))
        starts = ~inside & (chosen == self.ids.latent_start)
        steps = torch.where(continues, latent_steps + 1, torch.where(ends, -1, latent_steps))
        return emitted, torch.where(starts, 0, steps)

    def prompt_embeds(self, batch: Batch) -> torch.Tensor:
        """The inputs [B, L, D] of prompts with their images."""
        image_embeds, nothing = Tower(self.backbone.visual, trained=False, attention=self.backbone.attention).encode(
            batch
        )
        return build_inputs_embeds(self.backbone.embed_tokens(batch.input_ids), image_embeds, nothing, batch)


def load_decoder(
    model: str,
    *,
    latent_size: int | None = None,
    system_turn: bool | None = None,
    latent_end: LatentEnd = "fixed",
    max_new_tokens: int = 1024,
    sampling: Sampling = GREEDY,
    dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
) -> tuple[Decoder, Encoder]:
    """Loads a model folder or hub id on the device of `choose_device`, and the encoder of its prompts.

    Args:
        latent_size, system_turn: None: as `mirage export` wrote into the folder's config.json.
        dtype: None: bf16 on a GPU, float32 on the CPU.

    Raises:
        ConfigError: there is no Qwen2.5-VL with latent tokens, K is not known, the tokenizer is another model's, or the
            installed packages decode something else.
    """
    check_config(model, cache_dir)
    settings = read_latent_settings(model, cache_dir)
    if settings is not None:
        latent_size = settings.latent_size if latent_size is None else latent_size
        system_turn = settings.system_turn if system_turn is None else system_turn
    if latent_size is None:
        raise ConfigError(
            f"the number of latents per block is not known ({model}: config.json has no entry `mirage`, which `mirage "
            "export` writes); expected an exported run, or --latent-size; export the run, or set --latent-size"
        )
    device = choose_device()
    if dtype is None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
    encoder = load_encoder(
        model,
        stage="stage1",  # which encodes helper images too, if a sample has some
        latent_size=latent_size,
        system_turn=system_turn is not False,
        cache_dir=cache_dir,
        compress_strategy="average" if settings is None else settings.compress_strategy,
        exif_orientation=settings is None or settings.exif_orientation,
    )
    _check_ids(settings, encoder.ids, model)
    check_decoding()
    backbone = load_backbone(model, dtype=dtype, device_type=device, cache_dir=cache_dir)
    check_latent_ids(encoder.ids, backbone, model)
    backbone.to(device)
    decoder = Decoder(backbone, encoder.ids, latent_size, latent_end, max_new_tokens, sampling)
    decoder.answer_sees_image = settings is None or settings.answer_sees_image
    return decoder, encoder


def choose_device() -> str:
    """`cuda` if there is a GPU, unless DS_ACCELERATOR=cpu, as in training; DeepSpeed itself is not needed here."""
    wanted = torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
    return "cuda" if wanted else "cpu"


def _check_ids(settings: LatentSettings | None, ids: TokenIds, model: str) -> None:
    """Refuses a tokenizer that is not the one the model was trained with."""
    found = LatentTokenIds(pad=ids.latent_pad, start=ids.latent_start, end=ids.latent_end)
    if settings is not None and settings.latent_token_ids != found:
        raise ConfigError(
            f"the tokenizer has the latent tokens {found}, config.json says {settings.latent_token_ids} ({model}); "
            "they must be equal; export the run again"
        )
