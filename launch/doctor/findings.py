"""The findings of `mirage-launch doctor`: merged over the nodes and printed as one table. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from mirage_ds.errors import MirageError
from mirage_ds.wide_console import wide_console

State = Literal["ok", "warn", "fail"]

STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Row:
    """One finding: what was checked, the result, and the remedy."""

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What one rank found."""

    host: str
    rows: list[Row]
    same: dict[str, str]  # what must be equal on all nodes, by name


def failure(what: str, error: MirageError) -> Row:
    """A failed row from an error; the remedy is the last of the four parts of its message."""
    found, _, remedy = str(error).rpartition("; ")
    return Row(what, found, "fail", remedy)


def merge(reports: list[Report]) -> list[tuple[str, Row]]:
    """(hosts, row) in the order of the checks; equal rows of several hosts become one."""
    hosts: dict[Row, list[str]] = {}
    for report in reports:
        for row in report.rows:
            hosts.setdefault(row, []).append(report.host)
    num_hosts = len({report.host for report in reports})
    order = list(dict.fromkeys(row.what for row in hosts))
    rows = [("all" if len(names) == num_hosts else ", ".join(names), row) for row, names in hosts.items()]
    return sorted(rows, key=lambda each: order.index(each[1].what))


def show(rows: list[tuple[str, Row]], *, several_hosts: bool = False) -> None:
    """Prints the table."""
    table = Table(title="mirage-launch doctor")
    for heading in ("check", *(["hosts"] if several_hosts else []), "result", "state", "what to do"):
        table.add_column(heading, overflow="fold")
    for hosts, row in rows:
        host = [Text(hosts)] if several_hosts else []
        table.add_row(Text(row.what), *host, Text(row.found), Text(row.state, STYLES[row.state]), Text(row.remedy))
    wide_console().print(table)
