"""Qwen2.5-VL's processor without its part for videos, which alone needs torchvision.

torchvision has no build for the CPU beside the pinned torch, so AutoProcessor does not build here.
"""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil


class ImagesAlone(Qwen2_5_VLProcessor):
    """Takes images and text."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return (
            None
            if argument_name == "video_processor"
            else super().check_argument_for_proper_class(argument_name, argument)
        )


def joint_processor(folder: str | Path, **_: Any) -> ImagesAlone:
    """To be called instead of AutoProcessor.from_pretrained."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(folder)
    return ImagesAlone(images, tokenizer, None, chat_template=tokenizer.chat_template)
