"""The README's main job, its commands as written."""

import re
import subprocess
from pathlib import Path

import launching

ROOT = Path(__file__).parents[1]


def readme_commands(heading: str, level: str = "##") -> list[str]:
    """The blocks of commands under a heading of the README."""
    section = (ROOT / "README.md").read_text().split(f"\n{level} {heading}\n")[1].split(f"\n{level} ")[0]
    return re.findall(r"```(?:bash)?\n(.*?)```", section, re.DOTALL)


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
    """On rows that are drawn, or on the reference's own; the output goes to `folder`/log. Returns the folder."""
    drawn_rows, real_rows, job, *_ = readme_commands("The main job")
    (folder / "log").write_text(run((drawn_rows if drawn else real_rows) + job, folder))
    return folder
