"""The README's main job, its commands as written."""

import fcntl
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


def main_job(shared: Path, *, drawn: bool) -> Path:
    """The folder in which it ran, on rows that are drawn or on the reference's own; run by the first that asks.

    Its output is in the folder's `log`, the names of what it wrote into `runs` are in `left`.

    Args:
        shared: a folder that all processes of the tests see. They run it one at a time, as DeepSpeed's launcher
            always takes the same port.
    """
    folder = shared / f"main-job-{'drawn' if drawn else 'real'}"
    with (shared / "main-job.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "left").exists():
            assert not folder.exists(), "the main job has failed: read the message of the test that came first"
            folder.mkdir()
            drawn_rows, real_rows, job = (block.text for block in main_job_blocks())
            (folder / "log").write_text(run((drawn_rows if drawn else real_rows) + job, folder))
            (folder / "left").write_text("\n".join(sorted(path.name for path in (folder / "runs").iterdir())))
    return folder
