"""Prompts as a user of plain transformers makes them: a tokenizer, an image processor, no mirage_ds.

AutoProcessor does the same in one call, where torchvision can be installed.
"""

import io
import json
from pathlib import Path
from typing import Any

import transformers
from PIL import Image
from transformers import AutoTokenizer

try:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as ImageProcessor
except ImportError:  # transformers 4
    from transformers import Qwen2VLImageProcessor as ImageProcessor

IMAGE_PAD = "<|image_pad|>"


def plain_inputs(folder: Path, rows: list[dict[str, Any]], images_at: Path) -> dict[str, Any]:
    """The arguments of `generate` for rows of a JSONL file, padded on the left.

    Args:
        images_at: the folder in which the images of the rows are.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    processor = ImageProcessor.from_pretrained(folder)
    images = [Image.open(io.BytesIO((images_at / name).read_bytes())) for row in rows for name in row["image_input"]]
    features = dict(processor(images=images, return_tensors="pt")) if images else {}
    lengths = iter((features["image_grid_thw"].prod(dim=1) // processor.merge_size**2).tolist() if images else ())
    texts = []
    for row in rows:
        before, *after = tokenizer.apply_chat_template(messages(row), tokenize=False, add_generation_prompt=True).split(
            IMAGE_PAD
        )
        # The template writes the newline after `assistant`, which mirage_ds leaves to the model.
        texts.append((before + "".join(IMAGE_PAD * next(lengths) + text for text in after)).removesuffix("\n"))
    inputs = dict(tokenizer(texts, padding=True, return_tensors="pt"))
    if images and int(transformers.__version__.split(".")[0]) >= 5:  # else its own decoding has no grid positions
        pad = tokenizer.convert_tokens_to_ids(IMAGE_PAD)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == pad).long()
    return inputs | features


def messages(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation of a row up to its last question."""
    if "conversations" in row:
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        said = [(roles[turn["from"]], turn["value"]) for turn in row["conversations"]]
    else:  # without <image> in the text, images come first
        slots = "" if "<image>" in row["text_input"] else "<image>" * len(row["image_input"])
        said = [("user", slots + row["text_input"])]
    return [{"role": role, "content": content(text)} for role, text in said]


def content(text: str) -> list[dict[str, str]]:
    """Text and images of a turn, in their order."""
    first, *others = text.split("<image>")
    parts = [{"type": "text", "text": first}]
    for other in others:
        parts += [{"type": "image"}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
