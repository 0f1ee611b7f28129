"""How far a build is: a bar on a terminal; elsewhere a line now and then."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

LINE_S = 60  # between two lines where there is no terminal
_FIRST_LINE_S = 10

Report = Callable[[int, float], None]
"""Called with the number of rows that were read, and which part of all input that is, from 0 to 1."""


@contextmanager
def shown(what: str) -> Iterator[Report]:
    """Yields what shows the progress on stderr while the block lasts."""
    console = Console(stderr=True, highlight=False)
    rate = _Rate()
    if not console.is_terminal:
        yield _Lines(what, rate)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rows]}"), TimeRemainingColumn()
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(what, total=1.0, rows="")

        def report(rows: int, fraction: float) -> None:
            progress.update(bar, completed=fraction, rows=f"{rows} rows, {rate(rows):.0f} rows/s")

        yield report


class _Rate:
    """Rows per second since the first call; a continued build does not count what an earlier start did."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def __call__(self, rows: int) -> float:
        now = time.monotonic()
        if self.first is None:
            self.first = (rows, now)
        return (rows - self.first[0]) / max(now - self.first[1], 1e-9)


class _Lines:
    def __init__(self, what: str, rate: _Rate) -> None:
        self.what, self.rate = what, rate
        self.start: tuple[float, float] | None = None  # time and part at the first call
        self.next_s = _FIRST_LINE_S

    def __call__(self, rows: int, fraction: float) -> None:
        rate, now = self.rate(rows), time.monotonic()
        if self.start is None:
            self.start = (now, fraction)
        elapsed_s, done = now - self.start[0], fraction - self.start[1]
        if elapsed_s >= self.next_s and done > 0:
            self.next_s = int(elapsed_s) + LINE_S
            remaining_min = elapsed_s * (1 - fraction) / done / 60
            print(
                f"{self.what}: {rows} rows, {fraction:.1%}, {rate:.0f} rows/s, remaining: {remaining_min:.1f} min",
                file=sys.stderr,
                flush=True,
            )
