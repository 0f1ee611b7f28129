"""The parts of a long benchmark, each done once: a start continues after those that are complete."""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from threading import Lock
from typing import Any

from mirage_ds import strict_json
from mirage_ds.errors import ConfigError
from mirage_ds.versions import versions


class Parts:
    """The parts that are complete, in a file that outlives the process."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """
        Raises:
            ConfigError: the folder has parts that were made with other settings.
        """
        self.folder, self.path = folder, folder / "parts.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / "settings.json"
        if not made.exists():
            made.write_text(json.dumps(settings, indent=1) + "\n")
        if (found := strict_json.loads(made.read_text())) != json.loads(json.dumps(settings)):
            raise ConfigError(
                f"{made} has other settings (--output {folder}): {found}; one folder is for one task in one size; name "
                "another --output"
            )
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.done = {part["name"]: part for part in map(strict_json.loads, lines)}
        self.lock = Lock()  # parts of several arms end at the same time

    def once(self, name: str, outputs: Sequence[Path], action: Callable[[], None]) -> None:
        """Runs a part that is not complete, without what an interrupted one left of its outputs."""
        if name in self.done:
            return
        for path in outputs:
            shutil.rmtree(path, ignore_errors=True)
            path.unlink(missing_ok=True)
        started_s = time.monotonic()
        action()
        seconds = round(time.monotonic() - started_s, 1)
        today, commit = date.today().isoformat(), versions()["git_commit"]
        with self.lock, self.path.open("a") as file:
            self.done[name] = {"name": name, "seconds": seconds, "date": today, "commit": commit}
            file.write(json.dumps(self.done[name]) + "\n")
