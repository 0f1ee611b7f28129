"""The structure of the code: the order of imports, where Qwen is named, sizes, the way to the loss."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mirage_ds"
SOURCES = sorted(path for folder in ("mirage_ds", "data_tools", "launch") for path in (ROOT / folder).rglob("*.py"))

GROUND = (
    *(
        "batch",
        "config",
        "config_data",
        "config_lora",
        "config_train",
        "config_values",
        "console",
        "errors",
        "housekeeping",
        "launcher",
    ),
    *(
        "library_noise",
        "model_folder",
        "output_folder",
        "owner",
        "patch_grid",
        "paths",
        "programs",
        "recipe",
        "strict_json",
        "strict_yaml",
    ),
    *("tokens", "train_state", "versions", "wide_console"),
)
# A folder imports from itself and from the lines above its own, never from those below.
ORDER = (
    GROUND,
    ("ops",),
    ("data",),
    ("model",),
    ("self_check",),
    ("zero3",),
    ("checkpoint",),
    ("sizing",),
    ("training", "hf"),
    ("inference",),
    ("evaluation",),
    ("early_checks",),
    ("train", "cli"),
)
LAUNCH_ORDER = (
    ("demo_report", "lmms_eval_model"),
    ("planner", "doctor"),
    ("slurm", "local"),
    ("demo", "evaluate", "cli"),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 80


def imports(path: Path) -> set[str]:
    """Full names of the modules that a file imports, those inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def folder_of(path: Path, package: Path) -> str:
    """mirage_ds/data/encode.py -> data; mirage_ds/config.py -> config."""
    return path.relative_to(package).parts[0].removesuffix(".py")


def line_of(folder: str, lines: tuple[tuple[str, ...], ...]) -> int:
    return next(number for number, names in enumerate(lines) if folder in names)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_of_the_trainer(path: Path) -> None:
    if path.name == "__init__.py":
        assert not path.read_text().strip()
        return
    own = folder_of(path, PACKAGE)
    others = {module.split(".")[1] for module in imports(path) if module.startswith("mirage_ds.")} - {own}
    for other in others:
        both_ground = own in GROUND and other in GROUND
        assert both_ground or line_of(other, ORDER) < line_of(own, ORDER), f"{own} imports {other}"
        assert {own, other} != {"data", "model"}, "the loss does not know files, the data do not know the model"
    if own == "data":
        ops = {module.split(".")[2] for module in imports(path) if module.startswith("mirage_ds.ops.")}
        assert ops <= {"segments"}, "the data know how many patches a latent needs, not how they are pooled"
    assert not any(module.split(".")[0] in ("data_tools", "launch") for module in imports(path))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "launch").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "launch"))
)
def test_imports_of_the_launchers(path: Path) -> None:
    if path.name == "__init__.py":
        return
    own = folder_of(path, ROOT / "launch")
    others = {module.split(".")[1] for module in imports(path) if module.startswith("launch.")} - {own}
    for other in others:
        assert line_of(other, LAUNCH_ORDER) < line_of(own, LAUNCH_ORDER) or own == "cli", f"{own} imports {other}"


def test_no_circular_imports() -> None:
    """No file imports itself by way of others."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in SOURCES}
    arrows = {name: imports(path) & modules.keys() for name, path in modules.items()}
    while leaves := {name for name, to in arrows.items() if not to & arrows.keys()}:
        arrows = {name: to for name, to in arrows.items() if name not in leaves}
    assert not arrows


def test_data_tools_import_only_formats_and_rules() -> None:
    """The offline tools know rows, shards and the rules of maps: nothing that loads torch.

    Counting tokens needs a model's tokenizer and image processor; commands import these files when they run. The page
    of rows is made as that of `mirage inspect`, by the files of it that need no torch.
    """
    page = {"contents", "html", "pictures"}
    allowed = {"config", "errors", "model_folder", "output_folder", "owner", "paths", "programs", "strict_json"}
    allowed |= {"tokens", "wide_console"}
    for path in (ROOT / "data_tools").rglob("*.py"):
        formats = {
            "rows",
            "texts",
            "turns",
            "images",
            "shard_samples",
            "shards",
            "index",
            "columns",
            "ragged",
            "places",
            "spread",
        }
        formats |= {"row_images"} if path.parent.name == "importing" else set()
        formats |= {"costs", "counts", "encode"} if path.name in ("count.py", "lengths.py") else set()
        formats |= {"plan"} if path.name == "shuffled.py" else set()
        modules = {module for module in imports(path) if module.startswith("mirage_ds.")}
        for parts in (module.split(".")[1:] for module in modules):
            if parts[0] == "data":
                assert len(parts) == 1 or parts[1] in formats, path
            elif parts[0] == "evaluation":
                in_page = parts[1:2] == ["report"] and (len(parts) == 2 or parts[2] in page)
                assert len(parts) == 1 or parts[1] == "tasks" or in_page, path
            else:
                assert parts[0] in allowed, path


def test_what_says_that_it_needs_no_torch_loads_none() -> None:
    """Also by way of what it imports."""
    texts = {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in SOURCES}
    names = [path.relative_to(ROOT).with_suffix("") for path, text in texts.items() if "needs no torch" in text.lower()]
    modules = [".".join(name.parts) for name in names]
    assert {f"mirage_ds.data.{name}" for name in ("index", "columns", "plan", "costs", "steps")} <= set(modules)
    code = f"import sys, {', '.join(modules)}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_tasks_need_only_errors() -> None:
    for path in (PACKAGE / "evaluation" / "tasks").glob("*.py"):
        modules = {module for module in imports(path) if module.startswith("mirage_ds.")}
        assert all(module.startswith(("mirage_ds.errors", "mirage_ds.evaluation.tasks")) for module in modules), path


def test_only_the_backbone_names_qwen_model_classes() -> None:
    named = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if "Qwen2_5" in path.read_text()}
    assert named == {"model/backbone.py"}


def test_sizes() -> None:
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= MAX_FILE_LINES, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= MAX_FUNCTION_LINES, f"{path}: {node.name}"
    for name in ("rollout", "mirage"):
        assert len((PACKAGE / "model" / f"{name}.py").read_text().splitlines()) < 250


def test_from_train_to_the_loss_in_four_files() -> None:
    """train.py makes the Trainer, which calls the engine on MirageModel, whose forward calls losses.py."""
    path = ["train", "training/trainer", "model/mirage", "model/losses"]
    calls = [r"Trainer\(", r"self\.engine\(batch=", r"latent_losses\(", r"inverse_norms"]
    for name, call in zip(path, calls, strict=True):
        assert re.search(call, (PACKAGE / f"{name}.py").read_text()), name


def test_ascii_and_no_placeholders() -> None:
    for path in SOURCES:
        assert path.read_text().isascii(), path
        assert not re.search(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", path.read_text()), path


def test_the_architecture_page_names_every_folder() -> None:
    """Its tree of folders, and the files that lie beside them at the top of the trainer."""
    tree = (ROOT / "docs" / "architecture.md").read_text().split("```text\n")[1].split("```")[0]
    names = {f"{path.parent.name}/" for path in SOURCES}
    names |= {path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py"}
    assert not [name for name in names if name not in tree]
