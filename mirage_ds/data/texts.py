"""What a row's texts may contain: tags of images, but no special token. Needs no torch."""

from mirage_ds import tokens
from mirage_ds.errors import DataError

IMAGE_TAG = "<image>"
OUTPUT_IMAGE_TAG = "<output_image>"

# In a user's text, one of these would start a turn, an image or a latent block that does not exist.
RESERVED_TOKENS = (
    tokens.IM_START,
    tokens.IM_END,
    tokens.END_OF_TEXT,
    tokens.VISION_START,
    tokens.VISION_END,
    tokens.IMAGE_PAD,
    tokens.VIDEO_PAD,
    *tokens.LATENT_TOKENS,
)


def check_text(text: str, name: str, where: str) -> None:
    """Refuses a text that would write special tokens, or is no valid Unicode.

    Args:
        name: of the text, for messages.

    Raises:
        DataError: the message names `where`.
    """
    reserved = [token for token in RESERVED_TOKENS if token in text]
    if reserved:
        raise DataError(
            f"{name} contains {', '.join(reserved)} ({where}); only the chat template may write special tokens; "
            f"remove them, and mark images by {IMAGE_TAG} and {OUTPUT_IMAGE_TAG}"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name} contains half of a surrogate pair at character {error.start} ({where}); a text must be valid "
            "Unicode; write the complete character"
        ) from error


def check_answer_text(text: str, name: str, where: str) -> None:
    """Refuses <image> in an answer that is trained.

    Raises:
        DataError: the message names `where`.
    """
    if IMAGE_TAG in text:  # LLaMA-Factory's way to write an output image; it would be trained as text
        raise DataError(
            f"{name} contains {IMAGE_TAG} ({where}); allowed: {OUTPUT_IMAGE_TAG}, where a helper image "
            f"belongs; write {OUTPUT_IMAGE_TAG} there, or remove it"
        )
