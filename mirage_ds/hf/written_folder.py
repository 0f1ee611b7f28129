"""The last step of writing a model folder: what other versions of transformers read, and file modes by the umask."""

import json
import os
from pathlib import Path


def finish(folder: Path) -> None:
    """Completes a folder that transformers and safetensors have written."""
    _add_older_rope_entries(folder / "config.json")
    set_modes(folder)


def set_modes(folder: Path) -> None:
    """File modes by the umask: safetensors makes its files readable for the owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (path for path in folder.rglob("*") if path.is_file()):
        path.chmod(0o666 & ~mask)


def _add_older_rope_entries(path: Path) -> None:
    """transformers 5 writes `rope_parameters`, version 4 reads `rope_scaling` and `rope_theta`, as on the hub."""
    config = json.loads(path.read_text())
    text = config["text_config"]
    rope = text["rope_parameters"]
    text["rope_theta"] = rope["rope_theta"]
    kind = rope.get("rope_type", "default")
    others = {name: value for name, value in rope.items() if name != "rope_theta"}  # YaRN has a factor and more
    text["rope_scaling"] = {"type": kind, "rope_type": kind} | others
    path.write_text(json.dumps(config, indent=2) + "\n")
