"""Renders a sample's texts as a conversation in Qwen2.5-VL's chat template; loads the tokenizer that has it."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mirage_ds.data.rows import Sample, num_latent_blocks
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG
from mirage_ds.data.turns import Role, Turn
from mirage_ds.errors import MALFORMED, ConfigError
from mirage_ds.tokens import (
    ASSISTANT_MARKER,
    IM_START,
    IMAGE_PAD,
    LATENT_END,
    LATENT_START,
    LATENT_TOKENS,
    VISION_END,
    VISION_START,
)

ROLES: dict[Role, str] = {"system": "system", "human": "user", "gpt": "assistant"}
"""Of turns -> their names in the template."""
IMAGE_BLOCK = VISION_START + IMAGE_PAD + VISION_END
LATENT_BLOCK = LATENT_START + IMAGE_PAD + LATENT_END  # the pad becomes K latent pads when the ids are expanded


def load_tokenizer(model_path: str, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id, with the latent tokens.

    A hub model has none: they are added after its last token, in the reference's order, here and in `mirage init
    --from`. Whoever loads the model must check that it has embeddings for their ids.

    Raises:
        ConfigError: there is no tokenizer, or it has no chat template.
    """
    tokenizer = read_tokenizer(model_path, cache_dir)
    if not tokenizer.chat_template:
        raise ConfigError(
            f"the tokenizer has no chat template ({model_path}); Qwen2.5-VL's is needed; put chat_template.jinja there"
        )
    tokenizer.add_tokens(list(LATENT_TOKENS), special_tokens=True)
    return tokenizer


def read_tokenizer(model_path: str, cache_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The unmodified tokenizer of a model folder or hub id.

    Raises:
        ConfigError: there is none.
    """
    remedy = (
        f"a model folder has one; name one that `mirage init` wrote, or add it from another folder with `mirage init "
        f"--from {model_path} --processor-from FOLDER`"
    )
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(model_path, cache_dir=cache_dir))
    except MALFORMED as error:
        raise ConfigError(f"no tokenizer ({model_path}): {error!r}; {remedy}") from error
    if IM_START not in tokenizer.get_vocab():  # if the files are missing, transformers makes an empty tokenizer
        raise ConfigError(f"not a tokenizer of Qwen2.5-VL: it lacks {IM_START} ({model_path}); {remedy}")
    return tokenizer


def train_text(
    tokenizer: PreTrainedTokenizerBase, sample: Sample, *, latents: bool = True, system_turn: bool = True
) -> str:
    """The full conversation, with one <|image_pad|> for each image and each latent block.

    Args:
        latents: False: without latent blocks.
        system_turn: start with the template's default system turn, unless the row has its own.
    """
    block = LATENT_BLOCK if latents else ""
    in_front = "" if any(OUTPUT_IMAGE_TAG in turn.text for turn in sample.turns if turn.train) else block
    answer = Turn("gpt", in_front * num_latent_blocks(sample) + sample.text_output, train=True)
    messages = [_message(turn, block) for turn in (*_before_answer(sample), answer)]
    return _render(tokenizer, messages, system_turn)


def prompt_text(tokenizer: PreTrainedTokenizerBase, sample: Sample, *, system_turn: bool = True) -> str:
    """The prompt for decoding: `train_text` up to and including the <|im_start|>assistant of the last answer."""
    messages = [_message(turn, OUTPUT_IMAGE_TAG) for turn in _before_answer(sample)]
    return _render(tokenizer, messages, system_turn) + ASSISTANT_MARKER


def _before_answer(sample: Sample) -> tuple[Turn, ...]:
    """All turns before the last answer; with all images in front of the first question, if there is no <image>."""
    turns = sample.turns[:-1]
    if any(IMAGE_TAG in turn.text for turn in turns):
        return turns
    first = next(number for number, turn in enumerate(turns) if turn.role == "human")
    asked = replace(turns[first], text=IMAGE_TAG * len(sample.input_images) + turns[first].text)
    return (*turns[:first], asked, *turns[first + 1 :])


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], system_turn: bool) -> str:
    """The messages rendered by the template, with or without the system turn that it adds before the first one.

    The template has no option for it, but adds none to messages that follow others. To leave it out, a conversation is
    put in front, and its text is removed again.

    Raises:
        ConfigError: the template renders earlier turns differently when others follow.
    """
    if system_turn:
        return cast(str, tokenizer.apply_chat_template(messages, tokenize=False))
    other = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    before = cast(str, tokenizer.apply_chat_template(other, tokenize=False))
    both = cast(str, tokenizer.apply_chat_template(other + messages, tokenize=False))
    if not both.startswith(before):
        raise ConfigError(
            f"the chat template cannot leave out its system turn ({tokenizer.name_or_path}): its earlier turns must "
            "not depend on later ones; set data.system_turn=true, or use Qwen2.5-VL's template"
        )
    return both.removeprefix(before)


def _message(turn: Turn, block: str) -> dict[str, Any]:
    """A turn as the template takes it, with its images at its slots.

    Args:
        block: what stands for an <output_image> of a trained answer.
    """
    if turn.train or turn.role == "system":
        return {"role": ROLES[turn.role], "content": turn.text.replace(OUTPUT_IMAGE_TAG, block)}
    parts = re.split(f"({IMAGE_TAG}|{OUTPUT_IMAGE_TAG})", turn.text)
    image = {"type": "image"}
    content = [image if part in (IMAGE_TAG, OUTPUT_IMAGE_TAG) else {"type": "text", "text": part} for part in parts]
    return {"role": ROLES[turn.role], "content": content}
