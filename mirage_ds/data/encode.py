"""Encodes the conversation of one sample: token ids, labels, latent spans, positions.

Shape legend: L tokens, P patches, N images, K latents per block.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mirage_ds.config import CompressStrategy, Stage
from mirage_ds.data.conversation import IMAGE_BLOCK, LATENT_BLOCK, load_tokenizer, prompt_text, train_text
from mirage_ds.data.ids import expand_pads, find_prompt_length, supervised_labels
from mirage_ds.data.images import decode, header_size
from mirage_ds.data.patches import ImageProcessor
from mirage_ds.data.pooling import check_pooling, pooling_fault
from mirage_ds.data.positions import mrope_positions
from mirage_ds.data.rows import IMAGE_TAG, OUTPUT_IMAGE_TAG, Sample, check_question, check_sample, num_latent_blocks
from mirage_ds.data.target_cache import as_tensor
from mirage_ds.errors import MALFORMED, ConfigError, DataError
from mirage_ds.tokens import ASSISTANT_MARKER, IGNORE_INDEX, TokenIds

# Of the texts that an encoder keeps encoded, in all: rows of one task often have the same question and one of a few
# answers. A token takes 42 bytes.
MAX_KEPT_TOKENS = 2**16


class EncodedText(NamedTuple):
    """What does not depend on a sample's pixels. Samples with the same text share these tensors: never written to."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    image_mask: torch.Tensor
    latent_mask: torch.Tensor
    prompt_length: int


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
    prompt_length: int  # tokens up to and including <|im_start|>assistant
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
    ) -> None:
        """
        Args:
            latent_size: K of the latent blocks of samples that have none of their own.
            system_turn: start with the chat template's default system turn.
            max_length: maximum tokens of a sample; None: no limit.
            compress_strategy: how the model will pool helper images; each must have enough patches for it.
            exif_orientation: turn images as their EXIF orientation says.
            answer_sees_image: whether the answer attends to the input images after its first latent block.
        """
        self.ids = TokenIds.of(tokenizer)
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
        self._marker = self._tokenize(ASSISTANT_MARKER)
        self._kept_texts: dict[tuple[object, ...], EncodedText] = {}
        self._kept_tokens = 0
        self._check_template()

    def __call__(self, sample: Sample) -> EncodedSample:
        """Encodes one sample.

        Raises:
            DataError: the sample cannot be used in this stage; the message names its key.
        """
        check_sample(sample, sample.key)
        sizes = self._block_sizes(sample.text_output, len(sample.helper_images), sample.latent_sizes)
        pixel_values, grid_thw = self._patches(sample.input_images, f"{sample.key}.input")
        is_cached = sample.cached_targets is not None
        helper_images = sample.helper_images if self.stage == "stage1" and not is_cached else ()
        helper_name = sample.helper_name or f"{sample.key}.helper"
        pixel_values_latent, grid_thw_latent = self._patches(helper_images, helper_name)
        helper_grids = self._image_processor.merged_grids(grid_thw_latent)
        check_pooling(helper_grids, sizes, self.compress_strategy, helper_name)
        text = self._text(sample, grid_thw, sizes)
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
        """Encodes a sample's question and input images as a prompt for decoding.

        Raises:
            DataError: the question and its images do not match; the message names the sample's key.
        """
        check_question(sample, sample.key)
        pixel_values, grid_thw = self._patches(sample.input_images, f"{sample.key}.input")
        text = prompt_text(
            self.tokenizer,
            sample.text_input,
            num_input_images=len(sample.input_images),
            system_turn=self.system_turn,
        )
        num_merged = self._image_processor.num_merged(grid_thw)
        input_ids = expand_pads(self._tokenize(text), num_merged, [], self.ids)
        image_mask = input_ids == self.ids.image_pad
        no_patches, no_grid = self._patches((), "")
        return EncodedSample(
            key=sample.key,
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORE_INDEX),
            position_ids=mrope_positions(image_mask, grid_thw, self._image_processor.merge_size),
            image_mask=image_mask,
            latent_mask=torch.zeros_like(image_mask),
            prompt_length=len(input_ids),
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
        sizes = self._block_sizes(sample.text_output, len(sample.helper_images), sample.latent_sizes)
        return patches, self._image_processor.merged_grids(grid_thw), sizes

    def helper_fault(self, sample: Sample) -> str | None:
        """Why a sample's helper images cannot be pooled, from their headers; None: they can, or there are none."""
        # Not turned as EXIF says: an image can be pooled to K if its transpose can.
        grids = [self._image_processor.merged_grid_of(*header_size(image)) for image in sample.helper_images]
        sizes = self._block_sizes(sample.text_output, len(grids), sample.latent_sizes)
        fault = pooling_fault(grids, sizes, self.compress_strategy)
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

    def count_tokens(
        self,
        question: str,
        answer: str,
        sizes: Sequence[tuple[int, int]],
        num_helpers: int,
        latent_sizes: Sequence[int] = (),
    ) -> int:
        """The length of a sample with input images of these sizes, as `__call__` would encode it."""
        text = self._train_text(question, answer, len(sizes), num_helpers, latents=self.stage != "text")
        latents = self._block_sizes(answer, num_helpers, latent_sizes)
        return len(expand_pads(self._tokenize(text), self.image_tokens(sizes).tolist(), latents, self.ids))

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of emitted ids, without special tokens."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def _check_template(self) -> None:
        """A text-only template would silently drop the images."""
        name = self.tokenizer.name_or_path
        try:
            text = self._train_text(IMAGE_TAG, OUTPUT_IMAGE_TAG, 1, 1, latents=True)
        except (*MALFORMED, TemplateError) as error:
            raise ConfigError(
                f"the chat template cannot be used: {error!r} ({name}); expected Qwen2.5-VL's; copy its "
                "chat_template.jinja there"
            ) from error
        if [text.count(part) for part in (IMAGE_BLOCK, ASSISTANT_MARKER, LATENT_BLOCK)] != [1, 1, 1]:
            raise ConfigError(
                f"the chat template turns an image and an answer into {text!r:.200} ({name}); it "
                f"must write {IMAGE_BLOCK} for an image and {ASSISTANT_MARKER} before the answer; use Qwen2.5-VL's"
            )

    def _block_sizes(self, answer: str, num_helpers: int, own: Sequence[int]) -> list[int]:
        """K of each latent block of an encoded answer, whose row may have its `own`."""
        if self.stage == "text":
            return []
        return list(own) or [self.latent_size] * num_latent_blocks(answer, num_helpers)

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

    def _text(self, sample: Sample, grid_thw: torch.Tensor, latent_sizes: list[int]) -> EncodedText:
        """The text side of a sample whose input images have these grids; encoded once, as long as it is kept."""
        num_helpers, grids = len(sample.helper_images), tuple(grid_thw.flatten().tolist())
        key = (sample.text_input, sample.text_output, num_helpers, grids, *latent_sizes)
        if key not in self._kept_texts:
            text = self._encode_text(sample, num_helpers, grid_thw, latent_sizes)
            self._kept_tokens += len(text.input_ids)
            if self._kept_tokens > MAX_KEPT_TOKENS:
                self._kept_texts.clear()
                self._kept_tokens = len(text.input_ids)
            self._kept_texts[key] = text
        return self._kept_texts[key]

    def _encode_text(
        self, sample: Sample, num_helpers: int, grid_thw: torch.Tensor, latent_sizes: list[int]
    ) -> EncodedText:
        text = self._train_text(
            sample.text_input, sample.text_output, len(grid_thw), num_helpers, latents=self.stage != "text"
        )
        num_merged = self._image_processor.num_merged(grid_thw)
        input_ids = expand_pads(self._tokenize(text), num_merged, latent_sizes, self.ids)
        self._check_length(len(input_ids), sample.key)
        prompt_length = find_prompt_length(input_ids, self._marker)
        image_mask = input_ids == self.ids.image_pad
        return EncodedText(
            input_ids=input_ids,
            labels=supervised_labels(input_ids, prompt_length, self.ids),
            position_ids=mrope_positions(image_mask, grid_thw, self._image_processor.merge_size),
            image_mask=image_mask,
            latent_mask=input_ids == self.ids.latent_pad,
            prompt_length=prompt_length,
        )

    def _train_text(self, question: str, answer: str, num_inputs: int, num_helpers: int, *, latents: bool) -> str:
        return train_text(
            self.tokenizer,
            question,
            answer,
            num_input_images=num_inputs,
            num_helper_images=num_helpers,
            latents=latents,
            system_turn=self.system_turn,
        )

    def _tokenize(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
