"""Every block of bash and Python in the documents runs as written, or says why not.

The blocks of a page run from top to bottom as one script in a copy of what the README's main job left behind.
"""

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import NamedTuple

import launching
import pytest
from main_job import main_job_blocks
from markdown_blocks import ROOT, RUNNABLE, Block, blocks, documents

# What commands may name from the project's root.
SOURCES = ("launch", "ds_configs", "mirage_ds", "data_tools", "benchmarks")
PAGES = {page.relative_to(ROOT).as_posix(): page for page in documents()}


class Outcome(NamedTuple):
    """What became of a page."""

    code: int
    output: str


def blocks_to_run(page: str) -> list[Block]:
    """Those that are run here."""
    found = [block for block in blocks(PAGES[page]) if block.language in RUNNABLE]
    return [block for block in found if not block.not_run and not block.run_by and block not in main_job_blocks()]


def mark(block: Block) -> str:
    """What is printed before a block runs."""
    return f"== {block.place} =="


def run_page(page: str, drawn_job: Path, folder: Path) -> Outcome:
    """Runs the blocks of a page in a copy of what the main job left behind, and of nothing that other tests added."""
    for name in (drawn_job / "left").read_text().splitlines():
        subprocess.run(["cp", "-r", "--parents", f"runs/{name}", folder], cwd=drawn_job, check=True)
    for name in SOURCES:
        (folder / name).symlink_to(ROOT / name)
    # No settings of this machine's user; a port of its own for torchrun. A model that is only named need not be here.
    environment = {"XDG_CONFIG_HOME": str(folder / "config"), "PET_MASTER_PORT": str(launching.free_port())}
    environment["HF_HUB_OFFLINE"] = "0"
    lines = []
    for block in blocks_to_run(page):
        file = folder / f"line{block.line}"
        file.write_text(block.text)
        lines += [f"echo '{mark(block)}'", f"{'source' if block.language == 'bash' else 'python - <'} {file}"]
    process = subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=launching.environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # the launchers that it started, too
    shutil.rmtree(folder)
    return Outcome(process.returncode, output)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(drawn_job: Path, tmp_path: Path, page: str) -> None:
    outcome = run_page(page, drawn_job, tmp_path)
    if outcome.code != 0:
        block = [block for block in blocks_to_run(page) if mark(block) in outcome.output][-1]
        output = outcome.output.rpartition(mark(block))[2][-6000:]
        pytest.fail(f"{block.place}: exit code {outcome.code}\n\n{block.text}\n{output}", pytrace=False)


def test_the_main_job_is_what_its_test_runs() -> None:
    assert [block.page for block in main_job_blocks()] == ["README.md"] * 3


@pytest.mark.parametrize("page", PAGES)
def test_what_another_test_runs_is_read_there(page: str) -> None:
    for block in blocks(PAGES[page]):
        if block.run_by:
            test = ROOT / block.run_by
            assert test.is_file(), f"{block.place}: there is no {block.run_by}"
            assert PAGES[page].name in test.read_text(), f"{block.place}: {block.run_by} does not read {page}"
