"""Paths that a user names: what is refused, in which words."""

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from mirage_ds.config import DataConfig
from mirage_ds.errors import ConfigError, DataError
from mirage_ds.model_folder import check_exists
from mirage_ds.paths import check_file, check_folder, without_secrets


def test_files_and_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    check_file(file, "--data", "a file")
    check_folder(tmp_path, "--checkpoint", "a folder")
    with pytest.raises(DataError, match=rf"not a file \(--data {re.escape(str(tmp_path))}\); expected a file; corr"):
        check_file(tmp_path, "--data", "a file")
    with pytest.raises(DataError, match=r"not a folder \(--checkpoint .*file\); expected a folder; correct the"):
        check_folder(file, "--checkpoint", "a folder")


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-VL-7B-Instruct", "some_team/model.v2", "folder", "./folder"])
def test_folders_and_hub_ids_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (tmp_path / "folder").mkdir()
    check_exists(name, f"--model {name}")


@pytest.mark.parametrize("name", ["none", "./none", "/none", "../none", "~/none", "none/of/these", "runs/none/"])
def test_other_names_are_folders_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(ConfigError, match=r"the model folder does not exist .*allowed: .*a hub id.*correct it") as got:
        check_exists(name, f"--model {name}")
    assert f"(--model {name})" in str(got.value)


def test_a_misspelt_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny-model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"No such file .*did you mean .*/runs/tiny-model\? allowed"):
        check_exists("runs/tiny-modle", "--model runs/tiny-modle")
    with pytest.raises(ConfigError, match=r"did you mean .*/runs\? allowed"):
        check_exists("rusn/tiny-model/x", "--model")


def test_without_the_hub_an_id_must_be_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"no folder a/b .*cache .* does not have it.*HF_HUB_OFFLINE"):
        check_exists("a/b", "--model a/b", tmp_path)
    (tmp_path / "models--a--b").mkdir()
    check_exists("a/b", "--model a/b", tmp_path)


@pytest.mark.parametrize(
    ("path", "reason"), [("file/a", "Not a directory"), ("x" * 300, "File name too long"), ("nothing", "no such file")]
)
def test_the_systems_reason_is_in_the_message(tmp_path: Path, path: str, reason: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=reason):
        check_file(tmp_path / path, "--data", "a file")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://someone:a@b@host:80/x", "http://host:80/x"),
        ("http://host/x?a='b'&sig=secret", "http://host/x"),
        ("http://host/x#token=secret", "http://host/x"),
        ("s3://key:sec/ret@bucket/x", "s3://bucket/x"),
        ("http://host:80/x@1/y", "http://host:80/x@1/y"),
        ("hf://datasets/a/b@main/x", "hf://datasets/a/b@main/x"),
    ],
)
def test_secrets_of_urls_are_left_out(url: str, shown: str) -> None:
    assert without_secrets(f"not {url} but") == f"not {shown} but"


def test_a_list_of_folders_is_refused_without_their_secrets() -> None:
    for folders in ([{"path": "http://someone:pass@host/x?sig=secret", "weight": 0}], {"path": "s3://a:pass@host"}):
        with pytest.raises(ValidationError, match="allowed: a path, or a list") as caught:
            DataConfig.model_validate({"shards": folders})
        assert not re.search("pass|secret", caught.value.errors()[0]["msg"])
