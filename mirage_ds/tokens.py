"""The special tokens of Qwen2.5-VL and of Mirage, and their ids in one tokenizer."""

from dataclasses import dataclass
from typing import Protocol

from mirage_ds.errors import ConfigError

IGNORE_INDEX = -100

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
# The order in which the reference adds them: 151665, 151666, 151667 in the real vocabulary.
LATENT_PAD = "<|latent_pad|>"
LATENT_START = "<|latent_start|>"
LATENT_END = "<|latent_end|>"
LATENT_TOKENS = (LATENT_PAD, LATENT_START, LATENT_END)

# The end of the prompt: everything up to and including it is unsupervised; the newline after it is supervised.
ASSISTANT_MARKER = IM_START + "assistant"


class _Vocabulary(Protocol):
    def get_vocab(self) -> dict[str, int]: ...


@dataclass(frozen=True)
class TokenIds:
    """Ids of the special tokens in one vocabulary."""

    im_start: int
    im_end: int
    end_of_text: int
    vision_start: int
    vision_end: int
    image_pad: int
    video_pad: int
    latent_pad: int
    latent_start: int
    latent_end: int

    @property
    def latents(self) -> tuple[int, int, int]:
        """Those of the three latent tokens."""
        return self.latent_pad, self.latent_start, self.latent_end

    @classmethod
    def of(cls, tokenizer: _Vocabulary) -> "TokenIds":
        """Looks the ids up.

        Raises:
            ConfigError: the tokenizer lacks one of them.
        """
        vocabulary = tokenizer.get_vocab()
        names = {
            "im_start": IM_START,
            "im_end": IM_END,
            "end_of_text": END_OF_TEXT,
            "vision_start": VISION_START,
            "vision_end": VISION_END,
            "image_pad": IMAGE_PAD,
            "video_pad": VIDEO_PAD,
            "latent_pad": LATENT_PAD,
            "latent_start": LATENT_START,
            "latent_end": LATENT_END,
        }
        missing = [token for token in names.values() if token not in vocabulary]
        if missing:
            where = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
            raise ConfigError(
                f"the vocabulary lacks {', '.join(missing)} (in {where}); a model folder for mirage_ds must have all "
                f"of {', '.join(names.values())}; use a folder whose tokenizer has them, for example one that "
                "`mirage init` wrote"
            )
        return cls(**{name: vocabulary[token] for name, token in names.items()})
