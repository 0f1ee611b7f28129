"""The folder of a build that is under way: OUTPUT.unfinished, beside the output, so that it moves in one step.

build.json           rows and options, which must be the same when it continues
begins               where each row begins, if rows are shuffled; see shuffled.py
NAME/ NAME.facts/    shards of an output, and what is known of the complete ones; see shard_writer.py
complete             exists when all outputs are complete and only have to be moved
"""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from data_tools.building.shard_writer import write_at_once
from mirage_ds.errors import DataError, name_full_disk, name_unwritable
from mirage_ds.output_folder import check_output, signals_as_errors
from mirage_ds.owner import Owner, of_output

_BUILD, _COMPLETE = "build.json", "complete"


class Unfinished:
    """An unfinished build that this process owns."""

    def __init__(self, outputs: Mapping[str, Path], owners: list[Owner]) -> None:
        """
        Args:
            outputs: the folders to be written, by name.
        """
        self.outputs, self.owners = outputs, owners
        self.path = path_of(next(iter(outputs.values())))

    def folder(self, name: str) -> Path:
        """Where the shards of an output are written."""
        return self.path / name

    def facts(self, name: str) -> Path:
        return self.path / f"{name}.facts"

    @property
    def is_complete(self) -> bool:
        return (self.path / _COMPLETE).exists()

    @property
    def num_shards(self) -> int:
        """How many complete shards there are."""
        return sum(len(list(self.facts(name).glob("shard-*.json"))) for name in self.outputs)

    def check_owner(self) -> None:
        """
        Raises:
            OwnerError: another program has taken over.
        """
        for owner in self.owners:
            owner.check()

    def finish(self) -> None:
        """Moves the outputs to their places. May be called again after it was interrupted anywhere."""
        (self.path / _COMPLETE).touch()
        self.check_owner()
        for name, output in reversed(list(self.outputs.items())):  # the first one last: if it is there, all are
            if self.folder(name).exists():
                self._move(self.folder(name), output)
        removed = self.path.with_name(f".{self.path.name}.tmp")
        shutil.rmtree(removed, ignore_errors=True)
        self.path.rename(removed)  # what is deleted file by file must not look like something to continue
        shutil.rmtree(removed)

    def _move(self, folder: Path, output: Path) -> None:
        try:
            folder.rename(output)
        except OSError as error:
            raise DataError(
                f"the output is complete but cannot be moved to its place: {error.strerror} ({output}); expected a new "
                f"or empty folder; it is kept in {folder}: the same command tries again"
            ) from error

    def begin(self, rows: list[dict[str, Any]], options: dict[str, Any]) -> None:
        """Finds whether an earlier build is there that this one continues, or notes what this one is.

        Args:
            rows: fingerprint of the input files.
            options: what the bytes of the shards depend on, besides the rows.

        Raises:
            DataError: it has other options or files.
        """
        self.path.mkdir(exist_ok=True)
        options = options | {"input": [each["path"] for each in rows]}
        if (self.path / _BUILD).exists():
            earlier = json.loads((self.path / _BUILD).read_bytes())
            self._check_options(earlier["options"], options)
            if earlier["rows"] == rows:
                return
            print(
                f"the rows have changed since the unfinished build in {self.path}: it begins again; complete shards "
                f"that are deleted: {self.num_shards}",
                file=sys.stderr,
            )
            shutil.rmtree(self.path)
            for output in self.outputs.values():
                check_output(output)  # if the earlier build was complete, one may be there
            self.path.mkdir()
        elif any(path.name != f"{_BUILD}.tmp" for path in self.path.iterdir()):
            raise DataError(
                f"not an unfinished build: no {_BUILD} ({self.path}); expected what a build of this output has left, "
                "or nothing; remove it or rename it"
            )
        write_at_once(self.path / _BUILD, json.dumps({"options": options, "rows": rows}, indent=1) + "\n")

    def _check_options(self, earlier: dict[str, Any], now: dict[str, Any]) -> None:
        names = [name for name in now if earlier.get(name) != now[name]]
        if names:
            changes = ", ".join(f"{name} was {earlier.get(name)} and is {now[name]}" for name in names)
            raise DataError(
                f"an unfinished build of this output has other options ({self.path}): {changes}; allowed: to continue "
                f"with the same ones; give those, or remove it with rm -r '{self.path}'"
            )


def path_of(output: Path) -> Path:
    """The folder of the unfinished build of an output."""
    return output.with_name(f"{output.name}.unfinished")


@contextmanager
def unfinished_build(outputs: Mapping[str, Path]) -> Iterator[Unfinished]:
    """Yields the unfinished build of some outputs, new or as an earlier start has left it, or refuses.

    An error or a signal inside leaves it, if it has a complete shard, so that the next start continues.

    Args:
        outputs: the folders to be written, by name; they must be beside each other.

    Raises:
        DataError: see `mirage_ds.output_folder.check_output`.
        OwnerError: another program writes one of them.
        DiskFullError: there is no space.
    """
    targets = {name: output.resolve() for name, output in outputs.items()}
    first = next(iter(outputs.values()))
    with ExitStack() as until_the_end:
        until_the_end.enter_context(signals_as_errors())
        build = Unfinished(targets, [of_output(target) for target in targets.values()])
        _check_outputs(build, outputs)
        with name_unwritable(first, "name another"):
            build.path.parent.mkdir(parents=True, exist_ok=True)
        for owner in build.owners:
            owner.claim()
            until_the_end.callback(owner.release)
        _check_outputs(build, outputs)  # again: the owner before may have written them since
        until_the_end.enter_context(_kept(build))
        with name_full_disk(build.path.parent, "free some space, or write it to another disk"):
            yield build


def _check_outputs(build: Unfinished, outputs: Mapping[str, Path]) -> None:
    """An output may be there only if an earlier start was ended while it moved them."""
    if not build.is_complete:
        for output in outputs.values():
            check_output(output)


@contextmanager
def _kept(build: Unfinished) -> Iterator[None]:
    """Says what is left where the build ends early, and leaves nothing that is of no use."""
    try:
        yield
    except BaseException as error:
        if build.num_shards:
            # The same command ends with the same DataError: its message says what to do.
            then = "" if isinstance(error, DataError) else "; the same command continues"
            print(f"complete shards that are kept: {build.num_shards} ({build.path}){then}", file=sys.stderr)
        elif (build.path / _BUILD).exists():
            shutil.rmtree(build.path, ignore_errors=True)
        raise
