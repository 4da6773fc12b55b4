"""The tests of a row, from the columns of the usual code data sets."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from itertools import chain
from typing import Any

from app.rewards.answers import plain

COLUMNS = (
    "tests",
    "test_list",
    "test",
    "input_output",
    "public_test_cases",
    "test_cases",
    "verification_info",
    "private_tests",
    "public_tests",
    "inputs",
    "ground_truth",
    "reward_model.ground_truth",
)
"""Columns that may hold tests, in order of preference: MBPP, HumanEval and KodCode, APPS and TACO, LiveCodeBench,
AceCode, Open-R1, CodeContests, the lists of APPS as columns, verl."""
BESIDE = ("entry_point", "test_setup_code", "test_imports", "metadata", "outputs", "fn_name")
"""Columns that say how those tests are run."""

PROGRAM = "solution"
"""Module that tests import the program's names from, where they do."""
_CALL = """
def _listed(value):
    return [_listed(item) for item in value] if isinstance(value, (list, tuple)) else value
assert _listed((Solution().{name} if "Solution" in globals() else {name})(*{arguments!r})) in {accepted!r}
"""
"""A test of a function by arguments and results from JSON, which has no tuples."""


@dataclass(frozen=True)
class Cases:
    """Tests of one problem.

    Attributes:
        runs: texts of standard input and expected standard output.
        tests: Python code that raises nothing where the program, whose names it uses, is right.
    """

    runs: tuple[tuple[str, str], ...] = ()
    tests: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.runs) + len(self.tests)


def read_cases(row: Mapping[str, Any], column: str | None) -> Cases:
    """Return the tests of a row, of which there may be none.

    Args:
        row: values by column name.
        column: the column that holds them, `a.b` for a nested one; by default the first of `COLUMNS` that has any.

    Raises:
        ValueError: they have no form that is known; the message says which form they have.
    """
    for path in (column,) if column else COLUMNS:
        value: Any = row
        for key in path.split("."):
            value = _parsed(value)
            value = value.get(key) if isinstance(value, Mapping) else None
        value = _parsed(plain(value))
        if not value:
            continue
        if path == "inputs":
            value = {"inputs": value, "outputs": plain(_parsed(row.get("outputs"))), "fn_name": row.get("fn_name")}
        try:
            cases = _cases(value, row)
            for test in cases.tests:
                _check(test)
        except (ValueError, TypeError, KeyError, AttributeError, SyntaxError, RecursionError) as error:
            raise ValueError(f"column {path!r} ({str(value)[:80]!r}): {type(error).__name__}: {error}") from error
        if len(cases):
            return cases
    return Cases()


def _parsed(value: Any) -> Any:
    """Return what a text holds as JSON if it is an object or a list, else the value."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except ValueError:
            return value  # code may begin so, too
    return value


def _check(test: str) -> None:
    """Raise ValueError for code that cannot fail, or only fail.

    The answer `42` cannot fail, and neither can tests in functions and classes that nobody calls; none passes that
    imports a module which is not installed.
    """
    if not _asserts(test):
        raise ValueError("no assertion is reached when this is run")
    tree = ast.parse(test)
    imports = [name.name for node in tree.body if isinstance(node, ast.Import) for name in node.names]
    imports += [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    for name in imports:
        module = name.partition(".")[0]
        if module != PROGRAM and not _is_installed(module):
            raise ValueError(f"the tests import {module!r}, which is not installed")


def _asserts(code: str) -> bool:
    """Return whether an assertion may be reached when code is run."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Import, ast.ImportFrom)
    run = [node for node in ast.parse(code).body if not isinstance(node, kinds)]
    return "assert" in code and any(
        isinstance(part, ast.Assert | ast.Raise | ast.Call) for node in run for part in ast.walk(node)
    )


def _functions(code: str) -> list[str]:
    """Return the tests that pytest would find and call in code that calls none itself."""
    if _asserts(code):
        return []
    found = [
        node for node in ast.parse(code).body if isinstance(node, ast.FunctionDef) and node.name.startswith("test")
    ]
    for node in found:
        if ast.unparse(node.args):
            raise ValueError(f"{node.name} takes arguments of pytest's, which are not supported")
    return [node.name for node in found]


@cache
def _is_installed(module: str) -> bool:
    return module in sys.modules or find_spec(module) is not None


def _cases(value: Any, row: Mapping[str, Any]) -> Cases:
    if isinstance(value, str):  # code
        if "def check(" in value and row.get("entry_point"):  # of HumanEval: is called with the program's function
            value += f"\ncheck({row['entry_point']})"
        elif names := _functions(value):  # for pytest, which calls them
            return Cases(tests=tuple(f"{_setup(row)}{value}\n{name}()" for name in names))
        return Cases(tests=(_setup(row) + value,))
    if isinstance(value, Mapping):
        if "test_cases" in value:
            return _cases(value["test_cases"], row)
        if "assert_case" in value:
            return Cases(tests=tuple(value["assert_case"]))
        inputs, outputs = (value[f"{key}s" if f"{key}s" in value else key] for key in ("input", "output"))
        if len(inputs) != len(outputs):
            raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
        return _joined([_case(*pair, value.get("fn_name")) for pair in zip(inputs, outputs, strict=True)])
    if all(isinstance(test, str) for test in value):
        return Cases(tests=tuple(_setup(row) + test for test in value))
    metadata = plain(_parsed(row.get("metadata")))
    common = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    parts = []
    for case in value:
        own = case.get("fn_name") or (case.get("metadata") or {}).get("func_name") or common
        kind = case.get("testtype") or case.get("type") or ("functional" if own else "stdin")
        called = kind in ("functional", "function_call")
        if called and not own:
            raise ValueError("a test of a function without its name")
        parts.append(_case(case["input"], case["output"], own if called else None))
    return _joined(parts)


def _case(given: Any, expected: Any, name: str | None) -> Cases:
    if not name:
        return Cases(runs=((_lines(given), _lines(expected)),))
    if not name.isidentifier():
        raise ValueError(f"fn_name={name!r}")
    if isinstance(given, str):  # a JSON value per line, as in LiveCodeBench
        given = [json.loads(line) for line in given.splitlines() if line.strip()]
        accepted = [json.loads(expected) if isinstance(expected, str) else expected]
    else:  # APPS puts some results into a list
        accepted = [expected, *(expected if isinstance(expected, list) and len(expected) == 1 else [])]
    return Cases(tests=(_CALL.format(name=name, arguments=list(given), accepted=accepted),))


def _joined(parts: Sequence[Cases]) -> Cases:
    return Cases(
        tuple(run for part in parts for run in part.runs), tuple(test for part in parts for test in part.tests)
    )


def _lines(value: Any) -> str:
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where the text of standard input or output is expected")
    return value


def _setup(row: Mapping[str, Any]) -> str:
    """Return what MBPP's tests need before them."""
    imports: Any = plain(row.get("test_imports")) or []
    code = [*([imports] if isinstance(imports, str) else imports), row.get("test_setup_code") or ""]
    return "".join(f"{line}\n" for line in code if line)


def same_output(given: str, expected: str) -> bool:
    """Return whether two outputs have the same words in the same lines; decimals may differ by 1e-6 of their value."""
    lines, others = ([line.split() for line in text.strip().splitlines()] for text in (given, expected))
    if [*map(len, lines)] != [*map(len, others)]:
        return False
    return all(map(_same_word, chain(*lines), chain(*others)))


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    try:
        return "." in expected and math.isclose(float(given), float(expected), rel_tol=1e-6, abs_tol=1e-6)
    except ValueError:
        return False
