"""Output that cannot end a run: its terminal may be closed, its pipe's reader gone, the disk of its log full."""

import io
import sys


class Lossy(io.FileIO):
    """Drops what the system refuses to take."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(data)
        except OSError:
            return len(data)


def keep_going() -> None:
    """From now on a print to stdout or stderr never raises OSError."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(Lossy(number, "w", closefd=False)),  # type: ignore[type-var]  # for the type of `data`
            encoding=before.encoding,
            errors="backslashreplace",  # a path or key that the terminal's encoding does not have
            line_buffering=True,
        )
        for number, before in ((1, sys.stdout), (2, sys.stderr))
    )
