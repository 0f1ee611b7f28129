"""Scores answers with a function of the user's own, from a file: `--task my_file.py:score`.

The function takes a row, a dict of its fields, and the answer's text. It returns a number or a bool, or None for a row
that cannot be scored. An empty answer decides which rows these are, so that no answer of other rows is left out.
"""

import hashlib
import importlib.util
import symtable
import sys
import tokenize
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from mirage_ds.errors import ConfigError, DataError, reason_of
from mirage_ds.evaluation.tasks.given import canonical, extract_given
from mirage_ds.evaluation.tasks.outcome import Outcome


@dataclass(frozen=True)
class Function:
    """A user's function, and the file that it is from."""

    file: str  # as tracebacks name it
    call: Callable[[dict[str, Any], str], Any]
    file_digest: str  # SHA-256 of the file
    scorable: dict[str, bool] = field(default_factory=dict)  # by a row's key: whether its empty answer has a score


def check_function(file: Path, name: str, setting: str) -> None:
    """Refuses a file without this function, without executing it: it may load a model, or need another machine's GPU.

    Args:
        setting: what names the two, for messages.

    Raises:
        ConfigError: there is no such file, it is no Python, or nothing in it has this name.
    """
    where = f"{setting}{file}:{name}"
    source, names = _read(file, where)
    if name not in names and "import *" not in source:
        raise _no_function("has no function", name, _functions(names), where)


def no_function_named(file: Path, setting: str) -> ConfigError:
    """The error for a task that is a file alone, with the functions that the file has; it is not executed.

    Raises:
        ConfigError: there is no such file, or it is no Python.
    """
    where = f"{setting}{file}"
    functions = _in_a_list(_functions(_read(file, where)[1]))
    return ConfigError(
        f"the task is a file without :function ({where}); expected the file and one of its functions, which are "
        f"{functions}; write {file.name}:function"
    )


def _read(file: Path, where: str) -> tuple[str, dict[str, symtable.Symbol]]:
    """The source of a file, and the names that its top level defines or imports."""
    _check_file(file, where)
    try:
        with tokenize.open(file) as opened:  # in the encoding that it names
            source = opened.read()
        symbols = symtable.symtable(source, file.name, "exec").get_symbols()
    except (OSError, SyntaxError, ValueError) as error:
        raise _cannot_be_imported(error, str(file), where) from error
    return source, {each.get_name(): each for each in symbols if each.is_assigned() or each.is_imported()}


def _functions(names: Mapping[str, symtable.Symbol]) -> list[str]:
    """Those that are functions or classes."""
    return [name for name, symbol in names.items() if symbol.is_namespace()]


def load_function(file: Path, name: str, setting: str) -> Function:
    """The function of this name in a Python file, which is executed.

    Args:
        setting: what names the two, for messages.

    Raises:
        ConfigError: there is no such file or function, or the file cannot be executed.
    """
    where = f"{setting}{file}:{name}"
    _check_file(file, where)
    spec = importlib.util.spec_from_file_location(f"mirage_task_{file.stem}", file)
    assert spec is not None  # as the file's name ends in .py
    assert spec.loader is not None
    assert spec.origin is not None
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code, which may raise anything
        raise _cannot_be_imported(error, spec.origin, where) from error
    function = getattr(module, name, None)
    if not callable(function):
        problem = "has no function" if function is None else "has something that cannot be called under the name"
        raise _no_function(problem, name, [key for key, value in vars(module).items() if callable(value)], where)
    return Function(spec.origin, function, digest)


def _check_file(file: Path, where: str) -> None:
    if not file.is_file():
        raise ConfigError(f"no such file ({where}); expected a Python file and its function; correct the path")


def _cannot_be_imported(error: Exception, file: str, where: str) -> ConfigError:
    return ConfigError(
        f"the file cannot be imported: {_in_words(error, file)} ({where}); expected a file that Python can import; "
        "fix it"
    )


def _no_function(problem: str, name: str, functions: Sequence[str], where: str) -> ConfigError:
    return ConfigError(
        f"the file {problem} {name!r:.80} ({where}); expected one of its functions, which are "
        f"{_in_a_list(functions)}; correct the name"
    )


def _in_a_list(functions: Sequence[str]) -> str:
    public = ", ".join(name for name in functions if not name.startswith("_"))
    return f"{public or 'none':.200}"


def score(function: Function, key: str, row: Mapping[str, Any], answer: str) -> Outcome:
    """What the function returns, and as `given` what the text gives as the answer.

    Args:
        key: of the row, for messages; no other row has it.

    Raises:
        ConfigError: the function raised an error, or returned neither a finite number nor a bool.
        DataError: it returns None for the row's empty answer.
    """
    if key not in function.scorable:
        function.scorable[key] = _value(function, key, row, "") is not None
    if not function.scorable[key]:
        raise DataError(
            "the task's function returned None (in a row that is to be scored); expected a number or a bool; fix the "
            "row or the function"
        )
    value = _value(function, key, row, answer)
    if value is None:
        raise ConfigError(
            f"the task's function returned None, but not for an empty answer ({_where(key, answer)}); expected None "
            "for all answers to a row that cannot be scored, and for no others; fix the function"
        )
    return Outcome(value, f"scored {value:g}", canonical(extract_given(answer)))


def _value(function: Function, key: str, row: Mapping[str, Any], answer: str) -> float | None:
    """What the function returns.

    Raises:
        ConfigError: it raised an error, or returned neither a finite number, a bool nor None.
    """
    try:
        value = function.call(dict(row), answer)
    except Exception as error:  # as above
        raise ConfigError(
            f"the task's function failed: {_in_words(error, function.file)} ({_where(key, answer)}); expected "
            "a number, a bool or None for every row and any answer, an empty one too; fix the function"
        ) from error
    if value is None:
        return None
    if not isinstance(value, Real | np.bool_) or not np.isfinite(float(value)):
        raise ConfigError(
            f"the task's function returned {value!r:.80} ({_where(key, answer)}); expected a finite number, a bool or "
            "None; fix the function"
        )
    return float(value)


def _where(key: str, answer: str) -> str:
    return f"row {key}, answer {answer!r:.60}"


def _in_words(error: Exception, file: str) -> str:
    """The error and the line of the user's file where it was raised."""
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error}"  # which ends with the file and the line
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    place = f", line {lines[-1]} of {Path(file).name}" if lines else ""
    return f"{type(error).__name__}: {reason_of(error)}{place}"
