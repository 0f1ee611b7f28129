"""Encodes one sample: its texts, see encode_text.py, and the patches of its images.

Shape legend: L tokens, P patches, N images, K latents per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from mirage_ds.config import CompressStrategy, Stage
from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.data.encode_text import TextEncoder
from mirage_ds.data.images import decode, header_size
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.pooling import check_pooling, pooling_fault
from mirage_ds.data.rows import Sample, check_prompt, check_sample, num_early_image_blocks, num_latent_blocks
from mirage_ds.data.target_cache import as_tensor
from mirage_ds.errors import DataError

LATE_IMAGE_REMEDY = (
    "with model.answer_sees_image=false or data.text_dropout_image images are hidden from there on, so all must come "
    "before it; leave the row out, or set model.answer_sees_image=true and data.text_dropout_image=0"
)


@dataclass
class EncodedSample:
    """A sample as the model takes it, before padding. Helper images are only encoded in stage 1, and not where a target
    cache has their targets."""

    key: str
    input_ids: torch.Tensor  # [L] int64
    labels: torch.Tensor  # [L] int64: labels[i] is input_ids[i] (not shifted), or IGNORE_INDEX
    position_ids: torch.Tensor  # [3, L] int64: time, height, width
    image_mask: torch.Tensor  # [L] bool: True at image pads
    latent_mask: torch.Tensor  # [L] bool: True at latent pads
    prompt_length: int  # tokens up to and including the <|im_start|>assistant of the first answer that is trained
    pixel_values: torch.Tensor  # [P, 588] uint8: patches of the input images, see `ImageProcessor`
    image_grid_thw: torch.Tensor  # [N, 3] int64
    pixel_values_latent: torch.Tensor  # [P, 588] uint8: patches of the helper images
    image_grid_thw_latent: torch.Tensor  # [N, 3] int64
    pixel_levels: torch.Tensor  # [3, 256] float32: red, green, blue: the rescaled and normalized value of each byte
    latent_sizes: list[int]  # K of each latent block
    faults: list[str] = field(default_factory=list)  # of the samples before it that could not be used
    target_slots: range = range(0)  # of the encoded helper images in the run's target cache, if it has one
    cached_targets: torch.Tensor | None = None  # [all latents, D + 1] float32: targets and their inverse norms
    set_number: int = 0  # of the run's folders of shards, the one that it is from
    hides_images: bool = False  # nothing after the first latent block attends to the input images


def load_encoder(
    model_path: str,
    *,
    stage: Stage,
    latent_size: int,
    system_turn: bool = True,
    max_length: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    cache_dir: Path | None = None,
    compress_strategy: CompressStrategy = "average",
    exif_orientation: bool = True,
    answer_sees_image: bool = True,
    drops_images: bool = False,
) -> "Encoder":
    """The encoder for a model folder or hub id; the arguments are those of `Encoder` and `ImageProcessor.load`.

    Raises:
        ConfigError: the folder lacks the tokenizer, its chat template, a special token, or the image processor.
    """
    return Encoder(
        load_tokenizer(model_path, cache_dir),
        ImageProcessor.load(model_path, cache_dir, min_pixels=min_pixels, max_pixels=max_pixels),
        stage=stage,
        latent_size=latent_size,
        system_turn=system_turn,
        max_length=max_length,
        compress_strategy=compress_strategy,
        exif_orientation=exif_orientation,
        answer_sees_image=answer_sees_image,
        drops_images=drops_images,
    )


class Encoder:
    """Encodes samples for one model and one stage."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: ImageProcessor,
        *,
        stage: Stage,
        latent_size: int,
        system_turn: bool = True,
        max_length: int | None = None,
        compress_strategy: CompressStrategy = "average",
        exif_orientation: bool = True,
        answer_sees_image: bool = True,
        drops_images: bool = False,
    ) -> None:
        """
        Args:
            latent_size: K of the latent blocks of samples that have none of their own.
            system_turn: start with the chat template's default system turn.
            max_length: maximum tokens of a sample; None: no limit.
            compress_strategy: how the model will pool helper images; each must have enough patches for it.
            exif_orientation: turn images as their EXIF orientation says.
            answer_sees_image: whether the answer attends to the input images after its first latent block.
            drops_images: in some samples it will not, which are drawn later (`data.text_dropout_image`).
        """
        self._text = TextEncoder(
            tokenizer, latents=stage != "text", system_turn=system_turn, merge_size=image_processor.merge_size
        )
        self.ids = self._text.ids
        self.tokenizer = tokenizer
        self._image_processor = image_processor
        self.pixel_levels = image_processor.pixel_levels
        self.stage = stage
        self.latent_size = latent_size
        self.system_turn = system_turn
        self.max_length = max_length
        self.compress_strategy = compress_strategy
        self._exif_orientation = exif_orientation
        self._answer_sees_image = answer_sees_image
        self.may_hide_images = not answer_sees_image or drops_images

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encodes one sample.

        Raises:
            DataError: the sample cannot be used in this stage; the message names its key.
        """
        check_sample(sample, sample.key)
        sizes = self._block_sizes(sample)
        pixel_values, grid_thw = self._patches(sample.input_images, f"{sample.key}.input")
        is_cached = sample.cached_targets is not None
        helper_images = sample.helper_images if self.stage == "stage1" and not is_cached else ()
        helper_name = sample.helper_name or f"{sample.key}.helper"
        pixel_values_latent, grid_thw_latent = self._patches(helper_images, helper_name)
        helper_grids = self._image_processor.merged_grids(grid_thw_latent)
        check_pooling(helper_grids, sizes, self.compress_strategy, helper_name)
        text = self._text(sample, grid_thw, sizes)
        self._check_length(len(text.input_ids), sample.key)
        if self.may_hide_images and sizes and num_early_image_blocks(sample) < len(sample.input_images):
            raise DataError(f"an image comes after the first latent block ({sample.key}); {LATE_IMAGE_REMEDY}")
        return EncodedSample(
            key=sample.key,
            **text._asdict(),
            pixel_values=pixel_values,
            image_grid_thw=grid_thw,
            pixel_values_latent=pixel_values_latent,
            image_grid_thw_latent=grid_thw_latent,
            pixel_levels=self.pixel_levels,
            latent_sizes=sizes,
            target_slots=range(0) if is_cached else sample.target_slots,
            set_number=sample.set_number,
            cached_targets=as_tensor(sample.cached_targets, sum(sizes)),
            hides_images=not self._answer_sees_image,
        )

    def helper_facts(self) -> dict[str, Any]:
        """All that decides, beside the tower, which targets a helper image gets."""
        return {
            "image_processor": self._image_processor.facts(),
            "exif_orientation": self._exif_orientation,
            "latent_size": self.latent_size,
            "compress_strategy": self.compress_strategy,
        }

    def prompt(self, sample: Sample) -> EncodedSample:
        """Encodes all that comes before a sample's last answer, with its input images, as a prompt for decoding.

        Raises:
            DataError: texts and images do not match, or an earlier answer has latents; the message names the key.
        """
        check_prompt(sample, sample.key)
        pixel_values, grid_thw = self._patches(sample.input_images, f"{sample.key}.input")
        no_patches, no_grid = self._patches((), "")
        return EncodedSample(
            key=sample.key,
            **self._text.prompt(sample, grid_thw)._asdict(),
            pixel_values=pixel_values,
            image_grid_thw=grid_thw,
            pixel_values_latent=no_patches,
            image_grid_thw_latent=no_grid,
            pixel_levels=self.pixel_levels,
            latent_sizes=[],
        )

    def helpers(self, sample: Sample) -> tuple[torch.Tensor, list[tuple[int, int]], list[int]]:
        """Encodes a sample's helper images alone, which `helper_fault` has nothing against.

        Returns:
            Patches [P, 588] uint8; rows and columns of merged patches, and K, of each image.
        """
        patches, grid_thw = self._patches(sample.helper_images, f"{sample.key}.helper")
        return patches, self._image_processor.merged_grids(grid_thw), self._block_sizes(sample)

    def helper_fault(self, sample: Sample) -> str | None:
        """Why a sample's helper images cannot be pooled, from their headers; None: they can, or there are none."""
        # Not turned as EXIF says: an image can be pooled to K if its transpose can.
        grids = [self._image_processor.merged_grid_of(*header_size(image)) for image in sample.helper_images]
        fault = pooling_fault(grids, self._block_sizes(sample), self.compress_strategy)
        return None if fault is None else fault[1]

    def merged_grids(self, sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[N, 2]: rows and columns of merged patches of images of these sizes (width, height) [N, 2]."""
        return self._image_processor.merged_grids_of(sizes)

    @property
    def image_facts(self) -> dict[str, Any]:
        """What decides the patches, and so the tokens, of an image."""
        return self._image_processor.facts()

    def image_tokens(self, sizes: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """[N]: tokens of input images of these sizes (width, height) [N, 2]."""
        return self._image_processor.image_tokens(sizes)

    def count_tokens(self, sample: Sample, sizes: Sequence[tuple[int, int]]) -> int:
        """The length of a sample whose input images have these sizes, as `__call__` would encode it."""
        return self._text.count(sample, self.image_tokens(sizes).tolist(), self._block_sizes(sample))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of emitted ids, without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _block_sizes(self, sample: Sample) -> list[int]:
        """K of each latent block of a sample."""
        if self.stage == "text":
            return []
        return list(sample.latent_sizes) or [self.latent_size] * num_latent_blocks(sample)

    def _check_length(self, length: int, key: str) -> None:
        if self.max_length is not None and length > self.max_length:
            raise DataError(
                f"the sample has {length} tokens ({key}); data.max_length allows {self.max_length}; raise it, make "
                "the images smaller with data.max_pixels, or leave the sample out"
            )

    def _patches(self, images: Sequence[bytes], where: str) -> tuple[torch.Tensor, torch.Tensor]:
        turn = self._exif_orientation
        return self._image_processor(
            [decode(data, f"{where}_{number}", exif_orientation=turn) for number, data in enumerate(images)]
        )
