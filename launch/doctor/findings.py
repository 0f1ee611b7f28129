"""What `mirage-launch doctor` finds: rows, joined over the nodes, and shown as one table. Needs no torch."""

from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from launch.wide_console import wide_console
from mirage_ds.errors import MirageError

State = Literal["ok", "warn", "fail"]

STYLES: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "bold red"}


@dataclass(frozen=True)
class Row:
    """What was looked at, what was found, and what to do about it."""

    what: str
    found: str
    state: State = "ok"
    remedy: str = ""


@dataclass(frozen=True)
class Report:
    """What one rank found."""

    host: str
    rows: list[Row]
    same: dict[str, str]  # what must be equal on all nodes


def failure(what: str, error: MirageError) -> Row:
    """Of an error's four parts the last is what to do."""
    found, _, remedy = str(error).rpartition("; ")
    return Row(what, found, "fail", remedy)


def merge(reports: list[Report]) -> list[tuple[str, Row]]:
    """(hosts, row) in the order of the checks; what several hosts found alike is one row."""
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
    for heading in ("what", *(["where"] if several_hosts else []), "found", "state", "what to do"):
        table.add_column(heading, overflow="fold")
    for hosts, row in rows:
        where = [Text(hosts)] if several_hosts else []
        table.add_row(Text(row.what), *where, Text(row.found), Text(row.state, STYLES[row.state]), Text(row.remedy))
    wide_console().print(table)
