"""What an arm changes: the decoder that decodes it, and what is asked."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch

from mirage_ds.data.encode import EncodedSample, Encoder
from mirage_ds.data.helpers import gray_png, in_places
from mirage_ds.data.images import open_image
from mirage_ds.data.rows import Sample, num_image_blocks
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG
from mirage_ds.errors import DataError
from mirage_ds.evaluation.answers import Row
from mirage_ds.evaluation.latents.arms import OWN, Arm
from mirage_ds.evaluation.latents.fed_states import (
    FirstStates,
    FixedState,
    MeanStates,
    NoisyStates,
    OracleStates,
    ShuffledStates,
    cycle_of,
    next_rows,
)
from mirage_ds.evaluation.latents.states import States
from mirage_ds.inference.feed import Feed
from mirage_ds.inference.generate import Decoder
from mirage_ds.inference.replaced import REPLACED
from mirage_ds.model.tower import Tower
from mirage_ds.ops.latent_pool import latent_pool
from mirage_ds.ops.segments import batch_segments


class Replacements:
    """The replacements of one evaluation. The same on every rank: all draws depend on the seed and the rows alone."""

    def __init__(self, decoder: Decoder, encoder: Encoder, rows: Sequence[Row], seed: int) -> None:
        self.decoder, self.encoder, self.rows, self.seed = decoder, encoder, rows, seed
        self._by_key = {row.sample.key: row.sample for row in rows}
        self._from_states: dict[str, Feed] = {}  # made once for all batches of an arm

    def prompt(self, arm: Arm, row: Row) -> EncodedSample:
        """What is asked of a row."""
        return self.encoder.prompt(self._asked(arm, row.sample))

    def _asked(self, arm: Arm, sample: Sample) -> Sample:
        if arm.image == OWN or not sample.input_images:
            return sample
        match arm.image:
            case "gray":
                turned = self.encoder.helper_facts()["exif_orientation"]
                sizes = [open_image(data, sample.key, exif_orientation=turned).size for data in sample.input_images]
                return replace(sample, input_images=tuple(gray_png(*size) for size in sizes))
            case "other":
                others = self._by_key[self._next_with_images[sample.key]].input_images
                return replace(sample, input_images=tuple(in_places(others, len(sample.input_images))))
            case "none":
                context = tuple(replace(turn, text=turn.text.replace(IMAGE_TAG, "")) for turn in sample.context)
                text = sample.text_input.replace(IMAGE_TAG, "").replace(OUTPUT_IMAGE_TAG, "")
                asked = replace(sample, context=context, text_input=text, input_images=())
                assert num_image_blocks(asked) == 0, "every slot was removed"
                return asked
        raise AssertionError(f"nothing replaces the input images in the arm {arm.name}")

    @cached_property
    def _next_with_images(self) -> dict[str, str]:
        return next_rows([row.sample.key for row in self.rows if row.sample.input_images], self.seed)

    def decoder_of(self, arm: Arm, states: States) -> Decoder:
        """The decoder of an arm; in the arm `own` its `feed` is None.

        Args:
            states: those of all rows, if the arm needs them; the same in every call.
        """
        if arm.latents == OWN:
            return self.decoder
        if arm.latents in REPLACED:
            return REPLACED[arm.latents](self.decoder)
        if not arm.needs_states:
            return replace(self.decoder, feed=self._feed(arm, states))
        if arm.name not in self._from_states:
            self._from_states[arm.name] = self._feed(arm, states)
        return replace(self.decoder, feed=self._from_states[arm.name])

    def _feed(self, arm: Arm, states: States) -> Feed:
        keys = [row.sample.key for row in self.rows]
        match arm.latents:
            case "noise":
                return NoisyStates(arm.noise, self.seed)
            case "first":
                return FirstStates()
            case "oracle":
                return OracleStates(self.targets)
            case "mean":
                return MeanStates(states)
            case "fixed":
                return FixedState(states, cycle_of(keys, self.seed))
            case "shuffled":
                return ShuffledStates(states, next_rows(keys, self.seed))
        raise AssertionError(f"nothing is fed at the latents in the arm {arm.name}")

    @torch.inference_mode()
    def targets(self, key: str) -> list[torch.Tensor]:
        """The latent targets [K, D] of each helper image of a row, in the model's dtype: as stage 1 feeds them.

        None for a row whose helper images cannot be pooled; see `check_targets`.
        """
        sample, backbone = self._by_key[key], self.decoder.backbone
        if not sample.helper_images or self.encoder.helper_fault(sample):
            return []
        patches, grids, latent_sizes = self.encoder.helpers(sample)
        tower = Tower(backbone.visual, trained=False, attention=backbone.attention)
        segments = batch_segments(grids, latent_sizes, self.encoder.helper_facts()["compress_strategy"])
        assert segments is not None, "there is an image"
        dtype = backbone.embed_tokens.weight.dtype
        values = tower.patch_values(patches.to(backbone.device), self.encoder.pixel_levels.to(backbone.device))
        pooled, _, _ = latent_pool(tower(values, grids), *segments, sum(latent_sizes), dtype)
        return list(pooled.split(latent_sizes))


def check_targets(encoder: Encoder, rows: Sequence[Row], arms: Sequence[Arm]) -> str | None:
    """Whether all helper images that were read can be pooled to K; call it before decoding. No pixel is decoded.

    Returns:
        A line about the rows that have no targets, which the latent health then leaves out; None: there are none.

    Raises:
        DataError: there are some, and the arm `oracle` feeds targets.
    """
    faults = [(row, fault) for row in rows if (fault := encoder.helper_fault(row.sample))]
    if not faults:
        return None
    first, fault = faults[0]
    found = f"rows whose helper images cannot be pooled to latent targets: {len(faults)}; the first: {fault}"
    if any(arm.latents == "oracle" for arm in arms):
        raise DataError(
            f"{found} ({first.where}, for the arm oracle); expected at least as many merged patches as latents, and "
            "for compress_strategy grid a grid of them that fits; use larger helper images, set fewer latents (the "
            "row's latent_size, else --latent-size or model.latent_size), or leave out the arm oracle"
        )
    return f"{found} ({first.where}); the latent health is without their target cosine"
