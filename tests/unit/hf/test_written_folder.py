"""Written model folders: readable by the umask, and with the same rope for transformers 4 and 5."""

import json
import os
from pathlib import Path

import pytest
from generated_rows import write_rows
from transformers import AutoConfig

from mirage_ds.hf.preset import write_tiny
from mirage_ds.hf.pretrained import copy_pretrained
from mirage_ds.hf.written_folder import finish


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A preset and its copy, written with umask 027."""
    folder = tmp_path_factory.mktemp("models")
    before = os.umask(0o027)
    try:
        write_tiny(write_rows(folder / "rows", 4), folder / "a", seed=0)
        copy_pretrained(str(folder / "a"), folder / "b")
    finally:
        os.umask(before)
    return [folder / "a", folder / "b"]


def test_modes_follow_the_umask(folders: list[Path]) -> None:
    for folder in folders:
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_both_names_of_the_rope(folders: list[Path]) -> None:
    """The older names as transformers 4.57 reads them (huggingface.co/Qwen/Qwen2.5-VL-7B-Instruct has them too)."""
    for folder in folders:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 1_000_000.0
        assert text["rope_scaling"] == {"type": "default", "rope_type": "default", "mrope_section": [4, 6, 6]}
        rope = AutoConfig.from_pretrained(folder).text_config.rope_parameters
        assert {name: rope[name] for name in ("rope_type", "rope_theta", "mrope_section")} == {
            "rope_type": "default",
            "rope_theta": 1_000_000.0,
            "mrope_section": [4, 6, 6],
        }


def test_a_longer_rope_keeps_its_numbers(folders: list[Path], tmp_path: Path) -> None:
    """YaRN, as Qwen2.5-VL's model card describes it."""
    longer = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "mrope_section": [4, 6, 6]}
    config = json.loads((folders[0] / "config.json").read_text())
    config["text_config"] |= {"rope_parameters": longer | {"rope_theta": 1e6}, "rope_scaling": None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    finish(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_scaling"] == longer | {"type": "yarn"}
    rope = AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters
    assert {name: rope[name] for name in longer} == longer
