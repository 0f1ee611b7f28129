"""The console for tables. In a log, where no terminal gives a width, rich would wrap everything at 80 columns."""

from rich.console import Console

LOG_COLUMNS = 160


def wide_console() -> Console:
    """As wide as the terminal, or LOG_COLUMNS without one."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(width=LOG_COLUMNS, highlight=False)
