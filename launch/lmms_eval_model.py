"""A model of this project in lmms-eval, the harness of many benchmarks: it asks, this decodes with latents, it scores.

    lmms-eval --model mirage --model_args pretrained=DIR,latent_end=fixed --tasks TASK --batch_size 8

lmms-eval finds `manifest` by its group of entry points, lmms_eval.models, which setup.cfg fills. Nothing else of this
project imports this file, or needs lmms-eval. One process: each of several would answer all questions.
"""

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image

from mirage_ds.data.collate import collate
from mirage_ds.data.rows import Sample, check_question
from mirage_ds.data.texts import IMAGE_TAG, OUTPUT_IMAGE_TAG
from mirage_ds.data.turns import Turn
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.inference.options import Decoding
from mirage_ds.inference.sampling import GREEDY, Sampling

log = logging.getLogger(__name__)

ROLES = {"system": "system", "user": "human", "assistant": "gpt"}
MAX_NEW_TOKENS = 1024  # of a task that names no limit
# Settings of decoding that are not honoured, with the values at which they change nothing. Names that are not known,
# such as image_aspect_ratio, are those of other models.
WITHOUT_EFFECT = {
    "num_beams": (1,),
    "repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
WITHOUT_EFFECT_ON_DRAWS = {"top_k": (0, -1), "min_p": (0,), "typical_p": (1,)}
_MODES_OF_PNG = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_TAGS = re.compile(f"{IMAGE_TAG}|{OUTPUT_IMAGE_TAG}")


class _Asked(NamedTuple):
    number: int  # of the request
    request: Instance
    key: str  # of its draws: task, split, document, and which of its repetitions it is, from 0
    settings: str


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
            ConfigError: a setting of decoding that cannot be honoured, or a task of another kind.
        """
        answers: dict[int, str] = {}
        times: Counter[str] = Counter()  # how often each question was asked: a task may have repeats
        asked = []
        for number, request in enumerate(requests):
            _, _, settings, doc_id, task, split = request.args
            question = f"{task}/{split}/{doc_id}"
            asked.append(_Asked(number, request, f"{question}/{times[question]}", repr(settings)))
            times[question] += 1
        for _, group in groupby(sorted(asked, key=lambda each: each.settings), key=lambda each: each.settings):
            alike = list(group)
            for start in range(0, len(alike), self.batch_size):
                answers |= self._answer(alike[start : start + self.batch_size])
        return [answers[number] for number in range(len(requests))]

    def _answer(self, batch: Iterable[_Asked]) -> dict[int, str]:
        """Requests with equal settings; empty answers to those that cannot be asked."""
        answers, numbers, prompts, settings = {}, [], [], {}
        for each in batch:
            _, to_messages, settings, doc_id, task, split = each.request.args
            messages = to_messages(self.task_dict[task][split][doc_id])
            try:
                prompts.append(self.encoder.prompt(to_sample(messages, each.key)))
                numbers.append(each.number)
            except DataError as error:
                log.warning("a question is answered by an empty text, as it cannot be asked: %s", error)
                answers[each.number] = ""
        decoder = self._decoder(settings)
        if prompts:
            decoded = decoder.generate(collate(prompts, align_latents=True))
            texts = [until(self.encoder.text_of(answer.ids), settings) for answer in decoded]
            answers |= dict(zip(numbers, texts, strict=True))
        return answers

    def _decoder(self, settings: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in settings.items() if value is not None}
        temperature: Any = given.get("temperature")
        samples = given.get("do_sample", temperature is not None) and temperature != 0
        for name, allowed in (WITHOUT_EFFECT | (WITHOUT_EFFECT_ON_DRAWS if samples else {})).items():
            if given.get(name, allowed[0]) not in allowed:
                raise ConfigError(
                    f"{name} {given[name]} (a task of lmms-eval); decoding with latents does not have it; allowed: "
                    f"{allowed[0]}; give --gen_kwargs {name}={allowed[0]}"
                )
        if samples and temperature is None:
            raise ConfigError(
                "do_sample without a temperature (a task of lmms-eval); allowed: both, or do_sample=False; give "
                "--gen_kwargs temperature=1.0, or do_sample=False"
            )
        sampling = Sampling(temperature, given.get("top_p", 1.0), self.decoder.sampling.seed) if samples else GREEDY
        return replace(self.decoder, max_new_tokens=given.get("max_new_tokens", MAX_NEW_TOKENS), sampling=sampling)

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
    """lmms-eval's messages as a question with its context. Images stand where they do; tags in texts are removed.

    Args:
        messages: {role, content: [{type: text, text} or {type: image, url: an image of Pillow or a path}]}

    Raises:
        ConfigError: they have a video or audio, or end with no question.
        DataError: a text has special tokens.
    """
    images: list[bytes] = []
    turns = []
    for message in messages:
        texts = []
        for part in message["content"]:
            if part["type"] == "image":
                images.append(_image_bytes(part["url"]))
            elif part["type"] != "text":
                raise ConfigError(
                    f"a question with {part['type']} ({where}); allowed: texts and images; choose another task"
                )
            texts.append(IMAGE_TAG if part["type"] == "image" else _TAGS.sub("", part["text"]))
        turns.append(Turn(ROLES[message["role"]], "".join(texts)))  # type: ignore[arg-type]
    *context, question = turns
    if question.role != "human":
        raise ConfigError(
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
    """A PNG file with the same pixels and EXIF, so that it is shown as the file of the benchmark would be."""
    if isinstance(image, str):
        image = Image.open(image)
    if image.mode not in _MODES_OF_PNG:
        image = image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", exif=image.info.get("exif", b""))
    return buffer.getvalue()
