"""Exact numbers of tokens: SHARDS/tokens-DIGEST.npz, which `mirage-data count` writes for one tokenizer.

It has the tokens of a sample's text, with its template and all markers, but without the pads of images and latents:
their number follows from the sizes in the index and the run's settings, see costs.py.
"""

import hashlib
import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from mirage_ds.config import Stage
from mirage_ds.data.conversation import train_text
from mirage_ds.data.places import LocalPlace
from mirage_ds.data.remote import NoAccess
from mirage_ds.data.rows import Sample
from mirage_ds.data.shards import ShardFolder, error_of
from mirage_ds.data.stream import SampleReader
from mirage_ds.errors import DataError, name_full_disk, name_unwritable
from mirage_ds.tokens import TokenIds

Counts = npt.NDArray[np.int32]  # [number of samples]
FORMAT = 1  # of what is counted: another one where the same texts count differently
GROUP = 256  # samples whose texts are tokenized together: tokenizers then uses all cores


def count_texts(folder: ShardFolder, tokenizer: PreTrainedTokenizerBase, *, system_turn: bool) -> dict[str, Counts]:
    """Reads all shards once; decodes no image.

    Args:
        tokenizer: as `load_tokenizer` makes it.
    Returns:
        The counts `without_latents`, for the stage text, and `with_latents`, for the others.
    Raises:
        DataError: a sample cannot be read.
    """
    read, image_pad = SampleReader(folder), TokenIds.of(tokenizer).image_pad
    counts = {name: np.zeros(folder.num_samples, np.int32) for name in ("without_latents", "with_latents")}

    def text(sample: Sample, name: str) -> str:
        return train_text(tokenizer, sample, latents=name == "with_latents", system_turn=system_turn)

    for start in range(0, folder.num_samples, GROUP):
        samples = [read(number) for number in range(start, min(start + GROUP, folder.num_samples))]
        for name, found in counts.items():
            ids = tokenizer([text(sample, name) for sample in samples], add_special_tokens=False)["input_ids"]
            found[start : start + GROUP] = [len(each) - each.count(image_pad) for each in ids]
    return counts


def save_counts(
    folder: ShardFolder, tokenizer: PreTrainedTokenizerBase, counts: dict[str, Counts], *, system_turn: bool
) -> Path:
    """Writes the counts, completely or not at all, in place of earlier ones; returns their path.

    Raises:
        DataError: the folder of shards cannot be written.
        DiskFullError: its disk is full.
    """
    path = folder.path / counts_name(tokenizer, system_turn=system_turn)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remedy = "nothing was written; free some space, and count again"
    with name_full_disk(folder.path, remedy), name_unwritable(path, "count in a copy of the shards that you may write"):
        try:
            with part.open("wb") as file:
                np.savez(file, shards=np.array(folder.digest), **counts)  # type: ignore[arg-type]
            part.rename(path)
        finally:
            part.unlink(missing_ok=True)
    return path


def load_counts(name: str, folder: ShardFolder, *, stage: Stage) -> Counts | None:
    """The counts of every sample for this stage, in the order of the index; None if there are none.

    Args:
        name: as `counts_name` gives it.
    Raises:
        DataError: the file is damaged, or was counted for other shards.
        StallError: its server does not answer.
    """
    path, remedy = folder.place.where(name), f"remove it, and run `mirage-data count {folder.place}` again"
    if not isinstance(folder.place, LocalPlace):
        remedy = "remove it, count on a disk before uploading, and upload it again"
    try:
        with np.load(
            io.BytesIO(folder.place.read_all(name)), allow_pickle=False
        ) as file:  # a zip file, whose checksums are compared
            shards = str(file["shards"])
            counts: Counts = file["without_latents" if stage == "text" else "with_latents"]
    except FileNotFoundError:
        return None
    except NoAccess as error:
        print(
            f"NOTE: taken as no counts of tokens: {error.strerror} ({path}); where there is none, a server may say so; "
            "count before uploading, or allow to read it",
            file=sys.stderr,
            flush=True,
        )
        return None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        kind = error_of(error) if isinstance(error, OSError) else DataError
        raise kind(
            f"the counts of tokens cannot be read: {error!s:.80} ({path}); expected the file that `mirage-data count` "
            f"wrote; {remedy}"
        ) from error
    if shards != folder.digest or counts.shape != (folder.num_samples,) or counts.dtype != np.int32:
        raise DataError(
            f"the counts of tokens are of other shards ({path}): manifest {shards:.12}, {counts.size} samples; "
            f"expected manifest {folder.digest:.12}, {folder.num_samples} samples; {remedy}"
        )
    return counts


def counts_name(tokenizer: PreTrainedTokenizerBase, *, system_turn: bool) -> str:
    """The name of the file in the folder: it has a digest of all that decides the counts beside the samples."""
    parts = (str(FORMAT), tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(system_turn))
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return f"tokens-{digest[:16]}.npz"
