"""A model of this project in lmms-eval, the harness of many benchmarks: it asks, this decodes with latents, it scores.

    lmms-eval --model mirage --model_args pretrained=DIR,latent_end=fixed --tasks TASK --batch_size 8

lmms-eval finds `manifest` by its group of entry points, lmms_eval.models, which setup.cfg fills. Nothing else of this
project imports this file, or needs lmms-eval. One process: each of several would answer all questions.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from mirage_ds.data.collate import collate
from mirage_ds.data.rows import Sample, check_question
from mirage_ds.data.texts import IMAGE_TAG
from mirage_ds.data.turns import Turn
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.inference.options import Decoding
from mirage_ds.inference.sampling import Sampling

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
MAX_NEW_TOKENS = 1024  # of a task that names no limit


class MirageModel(lmms):
    """Answers lmms-eval's requests of the kind generate_until."""

    is_simple = False  # requests have messages, in which images stand where they belong

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 1,
        latent_size: int | None = None,
        latent_end: str = "fixed",
        dtype: str | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """
        Args:
            pretrained: a folder that `mirage export` wrote, or a hub id.
            batch_size: questions that are decoded together.
            latent_size, latent_end, dtype, seed: as the options of `mirage evaluate`.
            device, max_batch_size: lmms-eval's own options; the device is the one of all our decoding.

        Raises:
            ConfigError: the model cannot be loaded, or an option cannot be honoured.
        """
        super().__init__()
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ConfigError(
                f"batch_size {batch_size}, max_batch_size {max_batch_size} (lmms-eval); allowed: a number of questions "
                "as batch_size alone; give --batch_size 8"
            )
        options = Decoding(pretrained, latent_size, latent_end, MAX_NEW_TOKENS, 0.0, 1.0, seed, dtype)  # type: ignore[arg-type]
        self.decoder, self.encoder = options.load()
        self.batch_size, self.device = int(batch_size), self.decoder.backbone.device
        if device is not None and self.device.type not in device:
            raise ConfigError(
                f"device {device} (lmms-eval), but this model is on {self.device}; allowed: the GPU if there is one; "
                "leave --device out"
            )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            DataError: a question that cannot be asked.
            ConfigError: a setting of decoding that cannot be honoured.
        """
        answers: dict[int, str] = {}
        asked = sorted(enumerate(requests), key=lambda each: repr(each[1].args[2]))
        for _, group in groupby(asked, key=lambda each: repr(each[1].args[2])):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                answers |= self._answer(alike[start : start + self.batch_size])
        return [answers[number] for number in range(len(requests))]

    def _answer(self, batch: Iterable[tuple[int, Instance]]) -> dict[int, str]:
        """Requests with equal settings, each with its number."""
        numbers, samples, settings = [], [], {}
        for number, request in batch:
            _, to_messages, settings, doc_id, task, split = request.args
            numbers.append(number)
            samples.append(to_sample(to_messages(self.task_dict[task][split][doc_id]), f"{task}/{split}/{doc_id}"))
        prompts = [self.encoder.prompt(sample) for sample in samples]
        decoder = self._decoder(settings)
        texts = [self.encoder.text_of(answer.ids) for answer in decoder.generate(collate(prompts, align_latents=True))]
        return {number: until(text, settings) for number, text in zip(numbers, texts, strict=True)}

    def _decoder(self, settings: Mapping[str, Any]) -> Any:
        if settings.get("num_beams", 1) not in (None, 1):
            raise ConfigError(
                f"num_beams {settings['num_beams']} (a task of lmms-eval); decoding with latents has one beam; give "
                "--gen_kwargs num_beams=1"
            )
        samples = settings.get("do_sample", True) and settings.get("temperature")
        sampling = Sampling(settings["temperature"], settings.get("top_p") or 1.0, self.decoder.sampling.seed)
        return replace(
            self.decoder,
            max_new_tokens=settings.get("max_new_tokens", MAX_NEW_TOKENS),
            sampling=sampling if samples else Sampling(),
        )

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """
        Raises:
            ConfigError: always: what a text is worth depends on latents that only decoding makes.
        """
        raise ConfigError(
            "a task of lmms-eval asks for the likelihood of texts; models with latents are decoded; choose a task "
            "whose output_type is generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """
        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "a task of lmms-eval asks in several rounds, which is not supported; allowed: tasks whose output_type is "
            "generate_until; choose one"
        )


def manifest() -> ModelManifest:
    """What lmms-eval calls this model."""
    return ModelManifest("mirage", chat_class_path=f"{__name__}.{MirageModel.__name__}")


def to_sample(messages: Sequence[Mapping[str, Any]], where: str) -> Sample:
    """lmms-eval's messages as a question with its context.

    Args:
        messages: {role, content: [{type: text, text} or {type: image, url: an image of Pillow or a path}]}

    Raises:
        DataError: they have a video or audio, or end with no question, or a text has special tokens.
    """
    images: list[bytes] = []
    turns = []
    for message in messages:
        texts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_image_bytes(part["url"]))
            elif part["type"] != "text":
                raise DataError(
                    f"a question with {part['type']} ({where}); allowed: texts and images; choose another task"
                )
            texts.append(IMAGE_TAG if part["type"] == "image" else part["text"])
        turns.append(Turn(ROLES[message["role"]], "".join(texts)))  # type: ignore[arg-type]
    *context, question = turns
    if question.role != "human":
        raise DataError(
            f"the last message is from {messages[-1]['role']} ({where}); expected a question, from user; choose "
            "another task"
        )
    sample = Sample(where, question.text, "", tuple(images), context=tuple(context))
    check_question(sample, where)
    return sample


def until(text: str, settings: Mapping[str, Any]) -> str:
    """The text up to the first of the settings' `until`, of which an empty line, lmms-eval's default, ends no answer:
    this project's models think in paragraphs before they answer."""
    ends = settings.get("until") or []
    for end in [ends] if isinstance(ends, str) else ends:
        text = text if end == "\n\n" else text.partition(end)[0]
    return text


def _image_bytes(image: Any) -> bytes:
    if isinstance(image, str):
        image = Image.open(image)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
