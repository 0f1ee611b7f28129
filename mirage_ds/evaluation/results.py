"""The results file of an evaluation: FILE has a line per answer, FILE.summary.json what follows from them."""

import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import DataError, name_unwritable
from mirage_ds.evaluation.answers import Answer
from mirage_ds.owner import of_output
from mirage_ds.versions import versions


class Results:
    """A results file that does not exist yet; its parts lie in FILE.parts/."""

    def __init__(self, output: Path) -> None:
        """Writes nothing yet.

        Raises:
            DataError: the file exists, or cannot be written.
        """
        output = output.resolve()  # a symbolic link stays one
        self.output, self.summary, self.parts = output, Path(f"{output}.summary.json"), Path(f"{output}.parts")
        for path in (self.output, self.summary):
            if path.exists():
                raise DataError(
                    f"the file exists already ({path}, --output); results need a new file; delete it, or name another"
                )
        self._owner = of_output(output)
        existing = next(folder for folder in output.parents if folder.exists())
        # Found before the rows are answered.
        with name_unwritable(output, "name another --output"), tempfile.TemporaryFile(dir=existing):
            pass

    def __enter__(self) -> "Results":
        """Becomes the only writer.

        Raises:
            DataError: it cannot be written.
            OwnerError: another evaluation writes it.
        """
        with name_unwritable(self.output, "name another --output"):
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._owner.claim()
        return self

    def __exit__(self, *_: object) -> None:
        self._owner.release()

    def write(self, text: str) -> None:
        """Writes this as the file, without a summary."""
        self._owner.check()
        new = Path(f"{self.output}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(self.output)

    def finish(self, answers: Iterable[Answer], summary: dict[str, Any]) -> None:
        """Writes both files; the versions are added to the summary."""
        self._owner.check()
        new = Path(f"{self.output}.new")
        with new.open("w") as file:
            file.writelines(strict_json.dumps(asdict(answer)) + "\n" for answer in answers)
        self.summary.write_text(strict_json.dumps(summary | {"versions": versions()}, indent=2))
        new.replace(self.output)
