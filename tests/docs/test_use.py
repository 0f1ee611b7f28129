"""The README's three ways to use a model, each as written, on the model of its main job."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import launching
import pytest
from markdown_blocks import ROOT, Block, blocks

HERE = Path(__file__).relative_to(ROOT).as_posix()
# Then what the block made is looked at. The processor of a machine without torchvision: see tests/joint_processor.py.
STAND_IN = """
import transformers
from joint_processor import joint_processor
transformers.AutoProcessor.from_pretrained = joint_processor
"""
LOOK = "\nprint('decodes with', getattr(ask.model.generate, 'func', ask.model.generate).__module__)\n"


def ways() -> list[Block]:
    return [block for block in blocks(ROOT / "README.md") if block.run_by == HERE]


def test_they_are_three_lines_at_most() -> None:
    """Empty lines left out."""
    assert [block.language for block in ways()] == ["bash", "python", "python"]
    assert all(len([line for line in block.text.splitlines() if line]) <= 3 for block in ways())


@pytest.mark.slow
def test_each_answers(drawn_job: Path, tmp_path: Path) -> None:
    """The second with the file of the folder, the third with transformers' own decoding."""
    (tmp_path / "runs").mkdir()
    shutil.copytree(drawn_job / "runs" / "tiny-mirage", tmp_path / "runs" / "tiny-mirage")
    shutil.copy(next((drawn_job / "runs" / "rows" / "images" / "level_3").glob("*_map.png")), tmp_path / "map.png")
    command, trusted, text = ways()
    assert answer(["bash", "-euc", command.text], tmp_path)
    stand_in = "" if importlib.util.find_spec("torchvision") else STAND_IN
    for block, module in ((trusted, ".custom_generate.generate"), (text, "transformers.generation.utils")):
        printed = answer([sys.executable, "-c", stand_in + block.text + LOOK], tmp_path)
        assert "'generated_text': " in printed
        assert printed.splitlines()[-1].startswith("decodes with ")
        assert printed.endswith(f"{module}\n")


def answer(command: list[str], folder: Path) -> str:
    environment = launching.environment() | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout
