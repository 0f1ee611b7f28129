"""The plan of the house holds: who imports whom, where Qwen is named, how long things are, how far the loss is."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mirage_ds"
SOURCES = sorted(path for folder in ("mirage_ds", "data_tools", "launch") for path in (ROOT / folder).rglob("*.py"))

# A room may import from its own layer and from those above it in this list, and from nothing below.
LAYERS = (
    ("errors", "tokens", "early_end", "heartbeat"),
    ("config", "batch", "distributed", "tasks", "versions"),
    ("latent_settings", "segments"),
    ("data", "ops"),
    ("model",),
    ("complete", "copies", "deepspeed_config", "engine", "metrics", "partitions", "preset", "pretrained", "reshard"),
    ("trainer", "validation"),
    ("checkpoint",),
    ("run", "export"),
    ("sampling",),
    ("generate",),
    ("evaluate", "terminal"),
    ("after_step",),
    ("train", "cli"),
)


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str:
    """mirage_ds.data.encode -> data; mirage_ds.engine -> engine."""
    return module.split(".")[1]


def layer(name: str) -> int:
    return next(number for number, rooms in enumerate(LAYERS) if name in rooms)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_import_order(path: Path) -> None:
    if path.name == "__init__.py":
        assert not path.read_text().strip()
        return
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    others = {room(module) for module in imports(path) if module.startswith("mirage_ds.")}
    for other in others - {own}:
        assert layer(other) <= layer(own), f"{own} imports {other}"
        assert {own, other} != {"data", "model"}
        assert {own, other} != {"data", "ops"}
        assert own != "tasks" or other == "errors"
    assert not any(module.split(".")[0] in ("data_tools", "launch") for module in imports(path))


def test_data_tools_import_only_formats_and_rules() -> None:
    allowed = {"errors", "tokens", "data", "tasks"}
    for path in (ROOT / "data_tools").rglob("*.py"):
        modules = [module for module in imports(path) if module.startswith("mirage_ds.")]
        assert {room(module) for module in modules} <= allowed, path
        assert not [
            m for m in modules if m.startswith("mirage_ds.data") and m.split(".")[2:3] not in (["sample"], ["shards"])
        ]


def test_only_the_backbone_names_qwen_model_classes() -> None:
    named = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if "Qwen2_5" in path.read_text()}
    assert named == {"model/backbone.py"}


def test_sizes() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 100, f"{path}: {node.name}"
    for name in ("rollout", "mirage"):
        assert len((PACKAGE / "model" / f"{name}.py").read_text().splitlines()) < 250


def test_from_train_to_the_loss_in_four_files() -> None:
    """train.py makes the Trainer, which calls the engine on MirageModel, whose forward calls losses.py."""
    path = ["train", "trainer", "model/mirage", "model/losses"]
    calls = [r"Trainer\(", r"self\.engine\(batch=", r"latent_losses\(", r"inverse_norms"]
    for name, call in zip(path, calls, strict=True):
        assert re.search(call, (PACKAGE / f"{name}.py").read_text()), name


def test_ascii_and_no_placeholders() -> None:
    for path in SOURCES:
        assert path.read_text().isascii(), path
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text()), path


def test_the_readme_names_every_file_of_the_package() -> None:
    tree = (ROOT / "README.md").read_text().split("\n## Files\n")[1]
    named = {name for line in tree.splitlines() if line.startswith("  ") for name in re.findall(r"\S+\.py\b", line)}
    there = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert named == there
