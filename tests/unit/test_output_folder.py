"""Outputs: complete or not there, refused before the work, and written by one program at a time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mirage_ds import owner
from mirage_ds.errors import DataError, OwnerError
from mirage_ds.output_folder import check_output, new_folder
from mirage_ds.owner import of_output


def write(output: Path) -> None:
    with new_folder(output) as folder:
        (folder / "file").write_text("content")


def test_an_output_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    for name, place in (("link", tmp_path / "disk"), ("dangling", tmp_path / "new")):
        (tmp_path / name).symlink_to(place)
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (place / "file").read_text() == "content"
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "link", "dangling", "new"}


def test_what_cannot_be_replaced_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="already exists"):
        check_output(tmp_path)
    with pytest.raises(DataError, match=r"cannot be written: Not a directory .*name another"):
        check_output(tmp_path / "file" / "new")
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "ismount", lambda path: True)
        with pytest.raises(DataError, match=r"is a mount point .*name a folder in it, for example .*empty/new"):
            check_output(tmp_path / "empty")
        patch.undo()
        patch.setattr(os, "geteuid", lambda: 12345)
        with pytest.raises(DataError, match="belongs to another user"):
            check_output(tmp_path / "empty")
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(DataError, match="is the current folder"):
        check_output(Path("."))
    assert check_output(Path("new")) == tmp_path / "empty" / "new"


def test_an_empty_folder_that_cannot_be_replaced_is_found_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, target: Path) -> Path:
        raise PermissionError(1, "Operation not permitted")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(DataError, match="cannot be written: Operation not permitted"), new_folder(tmp_path / "out"):
        pytest.fail("the work began")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_complete_output_is_not_deleted(tmp_path: Path) -> None:
    def write_while_another_appears() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("content")
            (tmp_path / "out" / "other").mkdir(parents=True)

    with pytest.raises(DataError, match=r"complete but cannot be moved .*kept in .*\.complete"):
        write_while_another_appears()
    assert [path.read_text() for path in tmp_path.glob(".out.*.complete/file")] == ["content"]


def test_the_second_program_is_refused(tmp_path: Path) -> None:
    with new_folder(tmp_path / "out"):
        with pytest.raises(OwnerError, match=rf"another program .* {os.getpid()} on .*since 20.*sign of life 20"):
            write(tmp_path / "out")
        write(tmp_path / "other")
    write(tmp_path / "out2")
    assert not list(tmp_path.glob(".*"))


def leave_dead_owner(output: Path) -> None:
    """What a killed program leaves."""
    dead = of_output(output)
    dead.folder.mkdir()
    (dead.folder / "1.json").write_text(json.dumps(dead.record | {"process": "another"}))


def test_a_dead_owner_is_taken_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave_dead_owner(tmp_path / "out")
    (tmp_path / ".out.1234.tmp").mkdir()
    (tmp_path / ".out.part-0-of-2.1234.tmp").mkdir()  # of another output
    write(tmp_path / "out")
    said = capsys.readouterr().err
    assert "takes over this output" in said
    assert f"rm -r '{tmp_path}/.out.1234.tmp'" in said
    assert said.count("left by") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.1234.tmp", ".out.part-0-of-2.1234.tmp", "out"]


def test_who_was_taken_over_puts_nothing_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "BEAT_S", 0.01)

    def write_while_another_takes_over() -> None:
        with new_folder(tmp_path / "out"):
            other = of_output(tmp_path / "out")
            (other.folder / "2.json").write_text(json.dumps(other.record))
            time.sleep(0.5)

    with pytest.raises(OwnerError, match="another program has taken over this output"):
        write_while_another_takes_over()
    assert [path.name for path in tmp_path.iterdir()] == [".out.owner"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    script = (
        "import sys, time; from pathlib import Path; from mirage_ds.output_folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])):\n    print('works', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    process.send_signal(number)
    assert process.wait(timeout=30) == 128 + number
    process.stdout.close()
    assert not list(tmp_path.iterdir())


def test_of_many_starts_one_writes(tmp_path: Path) -> None:
    """All find the same dead owner."""
    leave_dead_owner(tmp_path / "out")
    script = (
        "import sys, time; from pathlib import Path; from mirage_ds.output_folder import new_folder\n"
        "with new_folder(Path(sys.argv[1])):\n    time.sleep(1.5)\n"
    )
    starts = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "out")], stderr=subprocess.DEVNULL)
        for _ in range(6)
    ]
    assert sorted(bool(start.wait(timeout=60)) for start in starts) == [False] + [True] * 5
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
