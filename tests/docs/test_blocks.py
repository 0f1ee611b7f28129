"""Every block of bash and Python in the documents runs as written, or says why not.

The blocks of a page run from top to bottom as one script in a copy of what the README's main job left behind.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import launching
import pytest
from main_job import main_job_blocks
from markdown_blocks import ROOT, RUNNABLE, Block, blocks, documents

# What commands may name from the project's root.
SOURCES = ("launch", "ds_configs", "mirage_ds", "data_tools", "benchmarks")
BLOCKS = [block for page in documents() for block in blocks(page) if block.language in RUNNABLE]
TO_RUN = [block for block in BLOCKS if not block.not_run and not block.run_by and block not in main_job_blocks()]


@pytest.fixture
def folder(drawn_job: Path, tmp_path: Path) -> Iterator[Path]:
    """What the main job left behind, and not what other tests did there since."""
    for name in (drawn_job / "left").read_text().splitlines():
        subprocess.run(["cp", "-r", "--parents", f"runs/{name}", tmp_path], cwd=drawn_job, check=True)
    for name in SOURCES:
        (tmp_path / name).symlink_to(ROOT / name)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("page", sorted({block.page for block in TO_RUN}))
def test_the_blocks_of_a_page_run(folder: Path, page: str) -> None:
    lines = []
    for block in TO_RUN:
        if block.page == page:
            file = folder / f"line{block.line}"
            file.write_text(block.text)
            lines += [f"echo '{mark(block)}'", f"{'source' if block.language == 'bash' else 'python - <'} {file}"]
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(lines)],
        cwd=folder,
        env=launching.environment() | {"XDG_CONFIG_HOME": str(folder / "config")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    if result.returncode != 0:
        block = [block for block in TO_RUN if block.page == page and mark(block) in result.stdout][-1]
        output = result.stdout.rpartition(mark(block))[2][-6000:]
        pytest.fail(f"{block.place}: exit code {result.returncode}\n\n{block.text}\n{output}", pytrace=False)


def mark(block: Block) -> str:
    """What is printed before a block runs."""
    return f"== {block.place} =="


def test_the_main_job_is_what_its_test_runs() -> None:
    assert [block.page for block in main_job_blocks()] == ["README.md"] * 3


def test_what_another_test_runs_is_read_there() -> None:
    for block in BLOCKS:
        if block.run_by:
            test = ROOT / block.run_by
            assert test.is_file(), f"{block.place}: there is no {block.run_by}"
            assert Path(block.page).name in test.read_text(), (
                f"{block.place}: {block.run_by} does not read {block.page}"
            )
