"""Calls from the process that runs tests to the one that runs the program. Only values travel, never code or pickles.

Plain values arrive as copies of exactly the built-in types, so that a returned object cannot decide by a method of
its own what it equals. Anything else (functions, instances, iterators) stays where it is: the tests get a `Remote`.
"""

from __future__ import annotations

import builtins
import importlib
import io
import json
import operator
import os
import socket
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

_COLLECTIONS: dict[str, type[Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes}
_NUMBERS = {"Decimal": "decimal", "Fraction": "fractions", "complex": "builtins"}
_OPERATIONS: dict[str, Callable[..., object]] = {
    "__call__": lambda function, arguments, options: function(*arguments, **options),
    **{f"__{name}__": getattr(builtins, name) for name in (
        "getattr", "setattr", "len", "iter", "next", "bool", "str", "repr", "abs", "reversed",
    )},
    **{f"__{name}__": getattr(operator, name) for name in (
        "eq", "lt", "le", "gt", "ge", "getitem", "setitem", "delitem", "contains",
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "matmul",
    )},
}  # fmt: skip


def _pack(value: Any, refer: Callable[[object], int]) -> object:
    """Return a value as JSON can hold it; `refer` numbers what has no such form."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_pack(item, refer) for item in value]
    if isinstance(value, dict):
        return {"dict": [[_pack(key, refer), _pack(item, refer)] for key, item in value.items()]}
    for name, collection in _COLLECTIONS.items():
        if isinstance(value, collection):
            return {name: [_pack(item, refer) for item in value]}
    kind = type(value)
    if _NUMBERS.get(kind.__name__) == kind.__module__:
        return {kind.__name__: str(value)}
    if kind.__module__ == "numpy" and (listed := getattr(value, "tolist", None)):
        return _pack(listed(), refer)
    return {"object": refer(value)}


def _unpack(packed: Any, find: Callable[[int], object]) -> Any:
    if isinstance(packed, list):
        return [_unpack(item, find) for item in packed]
    if not isinstance(packed, dict):
        return packed
    [(name, inner)] = packed.items()
    if name == "object":
        return find(inner)
    if name in _NUMBERS:
        return getattr(importlib.import_module(_NUMBERS[name]), name)(inner)
    items = [_unpack(item, find) for item in inner]
    return dict(items) if name == "dict" else _COLLECTIONS[name](items)


def serve(source: Sequence[str]) -> None:
    """Run a program, tell its names, then do what the other end asks for, on descriptor 3, until it closes."""
    sys.set_int_max_str_digits(0)
    stream = socket.socket(fileno=3).makefile("rw")
    objects: list[object] = []

    def refer(value: object) -> int:
        objects.append(value)
        return len(objects) - 1

    module = sys.modules["solution"] = types.ModuleType("solution")
    for part in source:
        exec(compile(part, "solution.py", "exec", dont_inherit=True), module.__dict__)
    answer: object = {name: _pack(value, refer) for name, value in vars(module).items() if name[:2] != "__"}
    while True:
        stream.write(json.dumps(answer) + "\n")
        stream.flush()
        if not (line := stream.readline()):
            return
        operation, arguments = json.loads(line)
        try:
            value = _OPERATIONS[operation](*_unpack(arguments, objects.__getitem__))
            answer = {"value": _pack(value, refer)}
        except BaseException as error:  # noqa: BLE001 (for the tests to judge)
            answer = {"error": type(error).__name__}


class Remote:
    """An object of the program, for the tests. It equals nothing but what the program says of objects of its own."""

    def __init__(self, ask: Callable[..., Any], number: int) -> None:
        self.__dict__.update(_ask=ask, _number=number)

    def __call__(self, *arguments: object, **options: object) -> Any:
        return self._ask("__call__", self, arguments, options)

    def __getattr__(self, name: str) -> Any:
        return self._ask("__getattr__", self, name)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Remote) and bool(self._ask("__eq__", self, other))

    def __hash__(self) -> int:
        return int(self._number)


def _forwarded(operation: str) -> Callable[..., Any]:
    return lambda self, *arguments: self._ask(operation, self, *arguments)


for _name in _OPERATIONS.keys() - vars(Remote).keys():
    setattr(Remote, _name, _forwarded(_name))


def test(tests: list[str]) -> None:
    """Run tests against the program at the other end of descriptor 3, and write 1 or 0 for each to descriptor 1."""
    sys.set_int_max_str_digits(0)
    stream = socket.socket(fileno=3).makefile("rw")

    def refer(value: object) -> int:
        if isinstance(value, Remote):
            return int(value._number)
        raise TypeError(f"a {type(value).__name__} cannot be passed to the program")

    def find(number: int) -> Remote:
        return Remote(ask, number)

    def ask(operation: str, *arguments: object) -> Any:
        stream.write(json.dumps([operation, _pack(list(arguments), refer)]) + "\n")
        stream.flush()
        answer = json.loads(stream.readline())
        if "error" not in answer:
            return _unpack(answer["value"], find)
        kind = getattr(builtins, answer["error"], None)
        raise kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(answer["error"])

    given = json.loads(stream.readline())
    names = {  # but no built-in one, which could make a test pass
        name: _unpack(given[name], find) for name in given if name not in vars(builtins) and name[:2] != "__"
    }
    program = sys.modules["solution"] = types.ModuleType("solution")  # for tests that import it
    vars(program).update(names)
    sys.stdout = io.StringIO()  # what tests print
    for one in tests:
        try:
            exec(compile(one, "tests.py", "exec", dont_inherit=True), {"__name__": "tests", **names})
            passed = b"1"
        except BaseException:  # noqa: BLE001 (whatever it is, the test has failed)
            passed = b"0"
        os.write(1, passed)
