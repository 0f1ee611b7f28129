"""A tiny random model that opens latent blocks and ends its answers at positions that depend on the prompt."""

from pathlib import Path

import torch
from generated_rows import image_bytes, write_jsonl, write_rows
from transformers import Qwen2_5_VLForConditionalGeneration

from mirage_ds.data.conversation import load_tokenizer
from mirage_ds.hf.preset import write_tiny

# Scale of the rows of the head for these tokens, relative to a random model.
HEAD_SCALES = {"<|latent_start|>": 2.0, "<|im_end|>": 3.0}


def write_talkative(folder: Path, head_scales: dict[str, float] = HEAD_SCALES, *, closes_blocks: bool = False) -> Path:
    """Writes rows and the model FOLDER/model, whose tokenizer is trained on them.

    Args:
        closes_blocks: the model chooses <|latent_end|> after some states of a block, and hardly ever <|im_end|>.
    """
    rows = write_rows(folder / "rows")
    write_tiny(rows, folder / "random", seed=0)
    ids = load_tokenizer(str(folder / "random")).get_vocab()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "random", dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "lm_head.weight":
                parameter *= 0.25  # small beside the head, whose rows then decide
        for token, factor in head_scales.items():
            model.lm_head.weight[ids[token]] *= factor
        if closes_blocks:
            model.lm_head.weight[ids["<|latent_end|>"]] = 1.08 * model.lm_head.weight[ids["<|im_end|>"]]
    (folder / "random").rename(folder / "model")
    model.save_pretrained(folder / "model")
    return folder / "model"


def write_questions(folder: Path, count: int) -> Path:
    """Questions of many lengths: none, one or two images, of several sizes, in front or in the text."""
    folder.mkdir(parents=True)
    rows = []
    for number in range(count):
        images = [f"{number}_{place}.png" for place in range(number % 3)]
        for place, name in enumerate(images):
            size = (56 + 28 * (number % 4), 56 + 28 * (number % 5))
            (folder / name).write_bytes(image_bytes(size, seed=number + place))
        slots = "<image>" * len(images) if number % 2 else ""
        question = f"{'the plan ' * (number % 7)}{slots} reach {number}?"
        rows.append({"text_input": question, "image_input": images, "map_desc": [[1, 0], [-1, 2]], "id": number})
    return write_jsonl(folder / "questions.jsonl", rows)
