"""Rows of several turns, and by hand what Qwen2.5-VL's template makes of them: the tokens of the losses in [[ ]]."""

import json
from pathlib import Path
from typing import Any

from generated_rows import image_bytes, write_jsonl

from mirage_ds.config import Stage

SIZES = {"six.png": (84, 56), "four.png": (56, 56), "eight.png": (112, 56), "nine.png": (84, 84)}
"""Of the image files, which have as many merged patches."""
K = 4
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"

ROWS: list[dict[str, Any]] = [
    {  # all answers are trained, with three blocks in two of them; an image in the second question
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "<image> What is it?"},
            {"from": "gpt", "value": "A flag. <output_image>"},
            {"from": "human", "value": "And now? <image>"},
            {"from": "gpt", "value": "<output_image> Red, <output_image>of two."},
        ],
        "train_answers": "all",
        "image_input": ["six.png", "four.png"],
        "image_output": ["nine.png", "eight.png", "six.png"],
        "latent_size": [2, 3, 1],
    },
    {  # an image in an answer that is not trained
        "conversations": [
            {"from": "human", "value": "Look."},
            {"from": "gpt", "value": "I see <image> here."},
            {"from": "human", "value": "Where?"},
            {"from": "gpt", "value": "There. <output_image> Yes."},
        ],
        "image_input": "eight.png",
        "image_output": "nine.png",
    },
    {  # no tags
        "conversations": [
            {"from": "human", "value": "A longer question, with far more words than the others have in theirs?"},
            {"from": "gpt", "value": "No."},
            {"from": "human", "value": "Why?"},
            {"from": "gpt", "value": "I guess."},
            {"from": "human", "value": "Again?"},
            {"from": "gpt", "value": "So."},
        ],
        "train_answers": [0, 2],
        "image_input": ["four.png", "six.png"],
        "image_output": ["eight.png"],
    },
]


def texts(stage: Stage) -> list[str]:
    """The conversation of each row, with all pads."""

    def image(count: int) -> str:
        return "<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>"

    def block(size: int) -> str:
        return "" if stage == "text" else "<|latent_start|>" + "<|latent_pad|>" * size + "<|latent_end|>"

    return [
        "<|im_start|>system\nBe short.<|im_end|>\n"
        f"<|im_start|>user\n{image(6)} What is it?<|im_end|>\n"
        f"<|im_start|>assistant[[\nA flag. {block(2)}<|im_end|>\n]]"
        f"<|im_start|>user\nAnd now? {image(4)}<|im_end|>\n"
        f"<|im_start|>assistant[[\n{block(3)} Red, {block(1)}of two.<|im_end|>\n]]",
        #
        SYSTEM + "<|im_start|>user\nLook.<|im_end|>\n"
        f"<|im_start|>assistant\nI see {image(8)} here.<|im_end|>\n"
        "<|im_start|>user\nWhere?<|im_end|>\n"
        f"<|im_start|>assistant[[\nThere. {block(K)} Yes.<|im_end|>\n]]",
        #
        SYSTEM + f"<|im_start|>user\n{image(4)}{image(6)}"
        "A longer question, with far more words than the others have in theirs?<|im_end|>\n"
        "<|im_start|>assistant[[\nNo.<|im_end|>\n]]"
        "<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nI guess.<|im_end|>\n"
        "<|im_start|>user\nAgain?<|im_end|>\n"
        f"<|im_start|>assistant[[\n{block(K)}So.<|im_end|>\n]]",
    ]


def write_conversations(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Writes the rows with their images, and returns the JSONL file."""
    folder.mkdir(parents=True)
    for seed, (name, size) in enumerate(SIZES.items()):
        (folder / name).write_bytes(image_bytes(size, seed=seed + 1))
    return write_jsonl(folder / "rows.jsonl", json.loads(json.dumps(rows)))
