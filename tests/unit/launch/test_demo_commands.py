"""The demo's commands that run side by side."""

from pathlib import Path

import pytest

from launch.demo import SHORT, Demo

WRITE_AND_WAIT = (
    "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(600)"
)
FAIL_AFTER_IT = "import pathlib, sys, time\nwhile not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.05)\nsys.exit(3)"


def test_a_command_that_fails_ends_the_others(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    failing, waiting = (("python", "-c", code, pid) for code in (FAIL_AFTER_IT, WRITE_AND_WAIT))
    with (
        pytest.raises(SystemExit, match=r"(?s)`python .*` failed with exit code 3"),
        Demo(tmp_path / "demo", SHORT).commands(failing, waiting),
    ):
        pass
    assert not (Path("/proc") / pid.read_text()).exists()
