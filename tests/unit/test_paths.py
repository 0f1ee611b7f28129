"""Paths that a user names: what is refused, in which words."""

import re
from pathlib import Path

import pytest

from mirage_ds.errors import ConfigError, DataError
from mirage_ds.paths import check_file, check_folder, check_model


def test_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check_file(file, "--data", "a file")
    check_folder(tmp_path, "--checkpoint", "a folder")
    with pytest.raises(DataError, match=rf"no such file \(--data {re.escape(str(tmp_path))}\); expected a file; corr"):
        check_file(tmp_path, "--data", "a file")
    with pytest.raises(DataError, match=r"no such folder \(--checkpoint .*file\); expected a folder; correct the"):
        check_folder(file, "--checkpoint", "a folder")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "some_team/model.v2", "folder", "./folder"])
def test_folders_and_hub_ids_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    check_model(name, f"--model {name}")


@pytest.mark.parametrize("name", ["none", "./none", "/none", "../none", "~/none", "none/of/these", "runs/none/"])
def test_other_names_are_folders_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"the model folder does not exist .*allowed: .*a hub id.*correct it") as got:
        check_model(name, f"--model {name}")
    assert f"(--model {name})" in str(got.value)
