"""index.jsonl of a folder of shards: each sample's location and model-independent facts. Needs no torch."""

import hashlib
import json
from dataclasses import dataclass

from mirage_ds.data.shards import ShardFolder, error_of
from mirage_ds.errors import DataError

INDEX_NAME = "index.jsonl"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One sample: its members are bytes [offset, offset + size) of a shard, headers and padding included."""

    key: str
    shard: int  # number in Manifest.shards
    offset: int
    size: int
    input_sizes: list[tuple[int, int]]  # width, height of each input image, as in the user's file
    helper_sizes: list[tuple[int, int]]
    question_chars: int
    answer_chars: int
    image_blocks: int  # in the question
    latent_blocks: int  # in the answer
    latent_sizes: list[int] | None = None  # K of each latent block; None: all have the configured one

    def block_sizes(self, latent_size: int) -> list[int]:
        """K of each latent block, if the configured one is `latent_size`."""
        return self.latent_sizes or [latent_size] * self.latent_blocks


def load_index(folder: ShardFolder) -> list[IndexEntry]:
    """Reads index.jsonl: one entry per sample, in the order of their keys.

    Raises:
        DataError: it is missing, or does not match the manifest.
    """
    path = folder.place.where(INDEX_NAME)
    try:
        data = folder.place.file(INDEX_NAME, folder.manifest.index_sha256).read_bytes()
    except OSError as error:
        raise error_of(error)(
            f"{INDEX_NAME} cannot be read: {error.strerror} ({path}); a folder of shards has one; copy it again, or "
            "build again"
        ) from error
    if hashlib.sha256(data).hexdigest() != folder.manifest.index_sha256:
        raise DataError(
            f"{INDEX_NAME} does not match the manifest ({path}); both must come from one build; copy it "
            "again, or build again"
        )
    # The digest matches, so the contents need no further checks.
    return [IndexEntry(**json.loads(line)) for line in data.splitlines()]
