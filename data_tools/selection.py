"""`mirage-data filter` and `split`: new folders with some of the rows of a folder of shards."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_tools.conditions import INDEX_FIELDS, TOKEN_FIELDS, Condition, check_known
from data_tools.copy_rows import copy_rows
from data_tools.model_options import ModelOptions
from data_tools.sample_rows import read_row
from mirage_ds import strict_json
from mirage_ds.data.columns import Index
from mirage_ds.data.index import check_digests, load_index
from mirage_ds.data.shards import MANIFEST_NAME, Manifest, ShardFolder, load_manifest
from mirage_ds.errors import DataError
from mirage_ds.output_folder import check_output, new_folder

Numbers = npt.NDArray[np.int64]


def filter_rows(
    path: Path,
    output: Path,
    conditions: Sequence[Condition],
    *,
    options: ModelOptions | None,
    maxcount: int,
    maxsize: int,
) -> Manifest:
    """Copies the rows that meet all conditions to a new folder, completely or not at all.

    Raises:
        MirageError: a condition names an unknown field, no row meets them, a shard is damaged, or `output` exists.
    """
    _check_new(output)
    folder, index = _open(path)
    chosen = np.flatnonzero(meet(folder, index, conditions, options))
    return _copy(folder, index, {output: chosen}, maxcount, maxsize)[0]


def split_rows(
    path: Path,
    outputs: Sequence[Path],
    *,
    fractions: Sequence[float],
    by: str,
    seed: int,
    conditions: Sequence[Condition],
    options: ModelOptions | None,
    maxcount: int,
    maxsize: int,
) -> list[Manifest]:
    """Copies every row to one of the new folders.

    Args:
        fractions: of the rows, for each output, by hash; empty: by `conditions`.
        by: the field that is hashed: rows with equal values come into the same output.
        seed: changes the hash.
        conditions: rows that meet them all go to the first of two outputs, the others to the second.
    Raises:
        MirageError: as `filter_rows`; an output would have no rows; or outputs, fractions and conditions do not fit.
    """
    check_split(outputs, fractions, conditions)
    for output in outputs:
        _check_new(output)
    folder, index = _open(path)
    if conditions:
        parts = 1 - meet(folder, index, conditions, options).astype(np.int64)
    else:
        parts = _parts_by_hash(folder, index, fractions, by, seed)
    chosen = {output: np.flatnonzero(parts == number) for number, output in enumerate(outputs)}
    return _copy(folder, index, chosen, maxcount, maxsize)


def _check_new(output: Path) -> None:
    """Refuses what `check_output` does, and a place inside another data set."""
    target = check_output(output)
    outer = next((folder for folder in target.parents if (folder / MANIFEST_NAME).exists()), None)
    if outer is not None:
        raise DataError(
            f"the output is inside another folder of shards ({output} in {outer}); expected a place "
            "outside; name another"
        )


def _open(path: Path) -> tuple[ShardFolder, Index]:
    """The folder and its index, whose bytes are compared with the manifest: the new index is made from it."""
    folder = load_manifest(path)
    check_digests(folder)
    return folder, load_index(folder)


def check_split(outputs: Sequence[Path], fractions: Sequence[float], conditions: Sequence[Condition]) -> None:
    """Raises: DataError: not either fractions or conditions, or another number of outputs than they make."""
    expected = 2 if conditions else len(fractions)
    if bool(fractions) == bool(conditions) or len(outputs) != expected or len(set(outputs)) != expected:
        raise DataError(
            f"cannot split into these outputs (--output given: {len(outputs)}, --fractions: {len(fractions)}, --where: "
            f"{len(conditions)}); allowed: a fraction for each output, or conditions and two outputs, all outputs "
            "different; correct the options"
        )


def parse_fractions(text: str) -> list[float]:
    """`0.9,0.1` -> [0.9, 0.1].

    Raises:
        DataError: these are not positive numbers that add up to 1.
    """
    try:
        fractions = [float(each) for each in text.split(",")]
    except ValueError:
        fractions = []
    if len(fractions) < 2 or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise DataError(
            f"invalid fractions (--fractions {text}); allowed: at least two positive numbers that add up to 1; write "
            "for example --fractions 0.9,0.1"
        )
    return fractions


def meet(
    folder: ShardFolder, index: Index, conditions: Sequence[Condition], options: ModelOptions | None
) -> npt.NDArray[np.bool_]:
    """[number of rows]: whether a row meets all conditions.

    Raises:
        DataError: a condition names a field that no row has, or that needs a model.
    """
    rows = _fields(folder, index, [condition.field for condition in conditions], options)
    seen: Counter[str] = Counter()
    met = np.zeros(len(index), bool)
    for number, (where, fields) in enumerate(rows):
        seen.update(fields.keys())
        met[number] = all(condition.holds(fields, where) for condition in conditions)
    check_known(conditions, seen, f"{folder.place}")
    return met


def _parts_by_hash(folder: ShardFolder, index: Index, fractions: Sequence[float], by: str, seed: int) -> Numbers:
    """[number of rows]: the part of each row, by the hash of its field `by`."""
    ends = np.cumsum(fractions)[:-1]
    parts, num_with = np.zeros(len(index), np.int64), 0
    for number, (_, fields) in enumerate(_fields(folder, index, [by], None)):
        num_with += by in fields
        parts[number] = np.searchsorted(ends, _share(fields.get(by), seed), side="right")
    if not num_with:
        raise DataError(
            f"no row has the field {by} (--by {by}, {folder.place}); expected a field of the rows; correct the option"
        )
    return parts


def _share(value: Any, seed: int) -> float:
    """A number in [0, 1) that depends on the value and the seed alone."""
    digest = hashlib.sha256(f"{seed}/{strict_json.dumps(value)}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def _fields(
    folder: ShardFolder, index: Index, names: Sequence[str], options: ModelOptions | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """SHARD/KEY and the fields of each row; those of its JSON only if one of `names` is there."""
    tokens: dict[str, Numbers] = {}
    if needed := set(names) & set(TOKEN_FIELDS):
        if options is None:
            raise DataError(
                f"no model for {min(needed)} ({folder.place}); tokens are those of a model; add --model DIR"
            )
        # Imported here, as it imports torch, which takes seconds.
        from data_tools.lengths import counted_tokens

        counted = counted_tokens(folder, options)
        tokens = {name: counted[stage] for name, stage in TOKEN_FIELDS.items()}
    reads_rows = any(name not in INDEX_FIELDS and name not in TOKEN_FIELDS for name in names)
    for number, entry in enumerate(index):
        shard = folder.manifest.shards[entry.shard].name
        where = f"{shard}/{entry.key}"
        fields: dict[str, Any] = {}
        if reads_rows:
            sample = read_row(folder, entry, number).sample
            fields = {**sample.extra, "text_input": sample.text_input, "text_output": sample.text_output}
        fields |= {name: value(entry) for name, value in INDEX_FIELDS.items()}
        yield where, fields | {name: int(values[number]) for name, values in tokens.items()}


def _copy(
    folder: ShardFolder, index: Index, chosen: dict[Path, Numbers], maxcount: int, maxsize: int
) -> list[Manifest]:
    """Writes the rows of each output; all outputs are renamed to their places at the end."""
    for output, numbers in chosen.items():
        if not len(numbers):
            raise DataError(
                f"no row for the output ({output}): rows of {folder.place}: {len(index)}; a folder of shards needs at "
                "least one; change the conditions or fractions"
            )
    manifests = []
    with ExitStack() as folders:
        for output, numbers in chosen.items():
            needs_bytes = int(index.samples["size"][numbers].sum())
            new = folders.enter_context(new_folder(output, needs_bytes=needs_bytes))
            manifests.append(copy_rows(folder, index, numbers, new, maxcount=maxcount, maxsize=maxsize))
    return manifests
