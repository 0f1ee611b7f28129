"""Encodes the texts of one sample: token ids, labels, latent spans, positions. Needs no pixel.

Shape legend: L tokens, N images, K latents per block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from mirage_ds.data.conversation import IMAGE_BLOCK, LATENT_BLOCK, prompt_text, train_text
from mirage_ds.data.ids import expand_pads, find_answers, supervised_labels
from mirage_ds.data.positions import mrope_positions
from mirage_ds.data.rows import Sample
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG
from mirage_ds.data.turns import Turn
from mirage_ds.errors import MALFORMED, ConfigError
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


class TextEncoder:
    """Encodes the texts of samples for one tokenizer, with or without latents."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, latents: bool, system_turn: bool, merge_size: int
    ) -> None:
        """
        Args:
            latents: <output_image> becomes a latent block; otherwise it is left out.
            system_turn: start with the chat template's default system turn.
            merge_size: patches along each side of a merged one.

        Raises:
            ConfigError: the tokenizer's chat template is not Qwen2.5-VL's.
        """
        self.ids = TokenIds.of(tokenizer)
        self._tokenizer, self._latents, self._system_turn = tokenizer, latents, system_turn
        self._merge_size = merge_size
        self._marker = self._tokenize(ASSISTANT_MARKER)
        self._kept: dict[tuple[object, ...], EncodedText] = {}
        self._kept_tokens = 0
        self._check_template()

    def __call__(self, sample: Sample, grid_thw: torch.Tensor, latent_sizes: Sequence[int]) -> EncodedText:
        """The text side of a sample; encoded once, as long as it is kept.

        Args:
            grid_thw: [N, 3] int64, in patches, of its input images.
            latent_sizes: K of each of its latent blocks.
        """
        grids = tuple(grid_thw.flatten().tolist())
        key = (sample.context, sample.text_input, sample.text_output, len(sample.helper_images), grids, *latent_sizes)
        if key not in self._kept:
            text = self._encode(sample, grid_thw, latent_sizes)
            self._kept_tokens += len(text.input_ids)
            if self._kept_tokens > MAX_KEPT_TOKENS:
                self._kept.clear()
                self._kept_tokens = len(text.input_ids)
            self._kept[key] = text
        return self._kept[key]

    def prompt(self, sample: Sample, grid_thw: torch.Tensor) -> EncodedText:
        """What comes before a sample's answer, up to and including <|im_start|>assistant, without labels and latents.

        Args:
            grid_thw: [N, 3] int64, in patches, of its input images.
        """
        text = prompt_text(self._tokenizer, sample, system_turn=self._system_turn)
        input_ids = expand_pads(self._tokenize(text), self._num_merged(grid_thw), [], self.ids)
        image_mask = input_ids == self.ids.image_pad
        return EncodedText(
            input_ids=input_ids,
            labels=torch.full_like(input_ids, IGNORE_INDEX),
            position_ids=mrope_positions(image_mask, grid_thw, self._merge_size),
            image_mask=image_mask,
            latent_mask=torch.zeros_like(image_mask),
            prompt_length=len(input_ids),
        )

    def count(self, sample: Sample, image_tokens: Sequence[int], latent_sizes: Sequence[int]) -> int:
        """The length of a sample, as `__call__` would encode it, whose input images have so many tokens each."""
        return len(expand_pads(self._tokenize(self._train_text(sample)), image_tokens, latent_sizes, self.ids))

    def _encode(self, sample: Sample, grid_thw: torch.Tensor, latent_sizes: Sequence[int]) -> EncodedText:
        short_ids = self._tokenize(self._train_text(sample))
        input_ids = expand_pads(short_ids, self._num_merged(grid_thw), latent_sizes, self.ids)
        answers = find_answers(input_ids, self._marker)
        are_trained = [turn.train for turn in sample.turns if turn.role == "gpt"]
        trained = [answer for answer, is_trained in zip(answers, are_trained, strict=True) if is_trained]
        image_mask = input_ids == self.ids.image_pad
        return EncodedText(
            input_ids=input_ids,
            labels=supervised_labels(input_ids, trained, self.ids),
            position_ids=mrope_positions(image_mask, grid_thw, self._merge_size),
            image_mask=image_mask,
            latent_mask=input_ids == self.ids.latent_pad,
            prompt_length=trained[0].start,
        )

    def _check_template(self) -> None:
        """A text-only template would silently drop the images; others treat earlier turns in other ways."""
        name = self._tokenizer.name_or_path
        turns = Turn("human", IMAGE_TAG), Turn("gpt", OUTPUT_IMAGE_TAG, train=True)
        sample = Sample("", IMAGE_TAG, OUTPUT_IMAGE_TAG, (b"",), (b"",))
        longer = Sample("", IMAGE_TAG, OUTPUT_IMAGE_TAG, (b"",) * 2, (b"",) * 2, context=turns)
        try:
            texts = [
                train_text(self._tokenizer, each, latents=True, system_turn=self._system_turn)
                for each in (sample, longer)
            ]
        except (*MALFORMED, TemplateError) as error:
            raise ConfigError(
                f"the chat template cannot be used: {error!r} ({name}); expected Qwen2.5-VL's; copy its "
                "chat_template.jinja there"
            ) from error
        for number, text in enumerate(texts, start=1):
            if {text.count(part) for part in (IMAGE_BLOCK, ASSISTANT_MARKER, LATENT_BLOCK)} != {number}:
                raise ConfigError(
                    f"the chat template turns an image and an answer{', twice,' * (number - 1)} into {text!r:.200} "
                    f"({name}); it must write {IMAGE_BLOCK} for an image and {ASSISTANT_MARKER} before the answer; use "
                    "Qwen2.5-VL's"
                )

    def _train_text(self, sample: Sample) -> str:
        return train_text(self._tokenizer, sample, latents=self._latents, system_turn=self._system_turn)

    def _num_merged(self, grid_thw: torch.Tensor) -> list[int]:
        merged: list[int] = (grid_thw.prod(dim=1) // self._merge_size**2).tolist()
        return merged

    def _tokenize(self, text: str) -> torch.Tensor:
        return torch.tensor(self._tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.int64)
