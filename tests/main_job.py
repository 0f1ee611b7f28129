"""The README's main job, its commands as written."""

import subprocess
from pathlib import Path

import launching
from markdown_blocks import ROOT, Block, blocks


def main_job_blocks() -> list[Block]:
    """Its three blocks: rows that are drawn, the reference's own rows instead, and the job."""
    return [block for block in blocks(ROOT / "README.md") if block.heading.endswith(" / The main job")]


def run(script: str, folder: Path) -> str:
    """Runs commands as a user would from the project's root, but with everything written into `folder`."""
    if not (folder / "launch").exists():
        (folder / "launch").symlink_to(ROOT / "launch")
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=launching.environment(),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def run_main_job(folder: Path, *, drawn: bool) -> Path:
    """On rows that are drawn, or on the reference's own. Returns the folder.

    The output goes to `folder`/log, the names of what was written into `folder`/runs to `folder`/left.
    """
    drawn_rows, real_rows, job = (block.text for block in main_job_blocks())
    (folder / "log").write_text(run((drawn_rows if drawn else real_rows) + job, folder))
    (folder / "left").write_text("\n".join(sorted(path.name for path in (folder / "runs").iterdir())))
    return folder
