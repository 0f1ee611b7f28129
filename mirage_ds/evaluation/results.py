"""The results file of an evaluation: FILE has a line per answer, FILE.summary.json what follows from them."""

import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import DataError, name_unwritable
from mirage_ds.evaluation.answers import Answer
from mirage_ds.housekeeping import housekeeping
from mirage_ds.owner import of_output
from mirage_ds.versions import versions


def parts_of(output: Path) -> Path:
    """The folder in which the ranks write while they decode."""
    return Path(f"{output}.parts")


class Results:
    """A results file that does not exist yet; its parts lie in FILE.parts/."""

    def __init__(self, output: Path) -> None:
        """Writes nothing yet.

        Raises:
            DataError: the file exists, or cannot be written.
        """
        output = output.resolve()  # a symbolic link stays one
        self.output, self.summary, self.parts = output, Path(f"{output}.summary.json"), parts_of(output)
        self._check_new()
        self._owner = of_output(output)
        existing = next(folder for folder in output.parents if folder.exists())
        # Found before the rows are answered.
        with name_unwritable(output, "name another --output"), tempfile.TemporaryFile(dir=existing):
            pass

    def _check_new(self) -> None:
        continued = self.parts.exists()  # perhaps killed when the summary was there, but not yet the results
        for path in (self.output, self.summary):
            if path.exists() and not (path == self.summary and continued):
                raise DataError(
                    f"the file exists already ({path}, --output); results need a new file; delete it, or name another"
                )

    def __enter__(self) -> "Results":
        """Becomes the only writer.

        Raises:
            DataError: it cannot be written.
            OwnerError: another evaluation writes it.
        """
        with name_unwritable(self.output, "name another --output"):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._owner.claim()
        self._check_new()  # again: the owner before may have written it since
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.release()

    def finish(self, answers: Iterable[Answer], summary: dict[str, Any]) -> None:
        """Writes both files, and deletes the parts; the versions are added to the summary."""
        self._owner.check()
        new = Path(f"{self.output}.new")
        with new.open("w") as file:
            file.writelines(strict_json.dumps(asdict(answer)) + "\n" for answer in answers)
        new_summary = Path(f"{self.summary}.new")
        new_summary.write_text(strict_json.dumps(summary | {"versions": versions()}, indent=2))
        new_summary.replace(self.summary)
        self._finish(new)

    def finish_page(self, html: str) -> None:
        """Writes a page instead, and deletes the parts."""
        self._owner.check()
        new = Path(f"{self.output}.new")
        new.write_text(html, encoding="utf-8")
        self._finish(new)

    def _finish(self, new: Path) -> None:
        new.replace(self.output)
        with housekeeping(f"what is left of a finished evaluation was not deleted ({self.parts})", "delete it by hand"):
            shutil.rmtree(self.parts)
