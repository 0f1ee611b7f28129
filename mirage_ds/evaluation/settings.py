"""All that decides the answers of an evaluation: what a killed one must agree with to be continued."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from mirage_ds.evaluation.answers import Row
from mirage_ds.model_folder import JSON_NAMES

PACKAGES = ("mirage_ds", "torch", "transformers")  # they compute the answers
MODEL_NAMES, MODEL_SUFFIXES = (*JSON_NAMES, "merges.txt"), (".safetensors", ".bin", ".jinja")


def packages() -> dict[str, str]:
    """Versions. Not the commit of a checkout: most commits change no answer."""
    return {name: version(name) for name in PACKAGES}


def model_files(model: str) -> dict[str, str]:
    """Size and time of each file that is read of a model folder, by its name; nothing of a hub id.

    Another export into the same folder has other times. To hash the weights instead would take a minute at each start.
    """
    folder = Path(model)
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {path.name: _stamp(path) for path in files if path.name in MODEL_NAMES or path.suffix in MODEL_SUFFIXES}


def _stamp(path: Path) -> str:
    facts = path.stat()
    nanoseconds = facts.st_mtime_ns % 10**9
    return f"{facts.st_size} bytes of {datetime.fromtimestamp(facts.st_mtime):%Y-%m-%d %H:%M:%S}.{nanoseconds:09d}"


def digest_of_rows(rows: Sequence[Row]) -> dict[str, str]:
    """SHA-256 of the questions, their images and their other fields; not of the helper images, which few arms read."""
    facts = []
    for row in rows:
        sample = row.sample
        context = [[turn.role, turn.text] for turn in sample.context]
        own = [sample.text_input, sample.text_output, sample.extra, _of_each(sample.input_images)]
        facts.append([*own, context] if context else own)
    return {"rows": _sha256(json.dumps(facts, sort_keys=True).encode())}


def digest_of_helpers(rows: Sequence[Row]) -> dict[str, str]:
    """SHA-256 of the helper images and of the latents per block: what the arm `oracle` reads beside the others."""
    facts = [[_of_each(row.sample.helper_images), row.sample.latent_sizes] for row in rows]
    return {"helper_images": _sha256(json.dumps(facts).encode())}


def _of_each(images: Iterable[bytes]) -> list[str]:
    return [_sha256(image) for image in images]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
