"""`mirage-launch doctor [RECIPE] [key=value ...]`: checks what a run needs; one table of findings and remedies.

It checks this machine or, started by srun, all nodes of the allocation and the network between them:

    srun --nodes 2 --ntasks-per-node 1 mirage-launch doctor RECIPE
"""

import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from launch.doctor.findings import Report, Row, failure, merge, show
from mirage_ds.errors import ConfigError
from mirage_ds.paths import expanded
from mirage_ds.recipe import load_config
from mirage_ds.versions import check_versions


@expanded()
def command(
    recipe: Annotated[Path | None, typer.Argument(help="A YAML recipe; without one: the machine only.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value, values in YAML.")] = None,
) -> None:
    """Checks what a run needs, here or on each node of an allocation. Exit code 1: a check failed; 2: usage error."""
    try:
        check_versions()
    except ConfigError as error:
        # Unsupported versions may fail to import.
        show([("all", failure("versions", error))])
        raise typer.Exit(1) from error
    rows, several_hosts = examine(recipe, overrides)
    if os.environ["RANK"] != "0":
        return
    show(rows, several_hosts=several_hosts)
    if any(row.state == "fail" for _, row in rows):
        raise typer.Exit(1)


def examine(recipe: Path | None, overrides: list[str] | None) -> tuple[list[tuple[str, Row]], bool]:
    """Runs all checks: those of this rank's node, and those between the ranks.

    Returns:
        (hosts, row) of each finding, those of all nodes on rank 0; whether there are several nodes.
    Raises:
        ConfigError: the recipe, an override or its DeepSpeed configuration is invalid.
    """
    config = load_config(recipe, overrides) if recipe else None
    # Imported here: torch and transformers take seconds to import; the other commands need neither.
    from transformers.utils import logging as transformers_logging

    from launch.doctor import network_checks as network
    from launch.doctor.all_checks import check_node, facts
    from mirage_ds.launcher import map_launcher_variables
    from mirage_ds.zero3 import distributed
    from mirage_ds.zero3.deepspeed_config import resolve_deepspeed_config

    transformers_logging.disable_progress_bar()
    deepspeed_config = resolve_deepspeed_config(config) if config else {}
    map_launcher_variables()
    alone = os.environ["WORLD_SIZE"] == "1"
    # The other ranks of a node would report the same.
    rows = list(check_node(config, deepspeed_config)) if os.environ["LOCAL_RANK"] == "0" else []
    report = Report(socket.gethostname(), rows, facts(config))
    if alone:
        return merge([report]), False
    if problem := network.join():
        return [*merge([report]), (report.host, problem)], False
    together = [network.measure_bandwidth(), network.compare_clocks()]
    reports = network.gather(report)
    distributed.shut_down()
    together += network.check_same(reports)
    return [*merge(reports), *(("all", row) for row in together)], len({report.host for report in reports}) > 1
