"""JSON that gives back what was written: tuples stay tuples, and keys that are no strings stay what they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

_TUPLE, _ITEMS = "__tuple__", "__items__"


def dumps(value: Any) -> str:
    """The text of a value. Raises TypeError, naming the type, for what JSON cannot express (bytes, dates, sets)."""
    return json.dumps(_tagged(value), ensure_ascii=False)


def loads(text: str) -> Any:
    """The value of a text, of `dumps` or of any JSON writer."""
    return json.loads(text, object_hook=_untagged)


def _tagged(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return _tagged(value.tolist())
    if isinstance(value, tuple):
        return {_TUPLE: [_tagged(item) for item in value]}
    if isinstance(value, list):
        return [_tagged(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    if all(isinstance(key, str) for key in value):
        return {key: _tagged(item) for key, item in value.items()}
    return {_ITEMS: [[_tagged(key), _tagged(item)] for key, item in value.items()]}


def _untagged(found: dict[str, Any]) -> Any:
    if found.keys() == {_TUPLE}:
        return tuple(found[_TUPLE])
    if found.keys() == {_ITEMS}:
        return dict(found[_ITEMS])
    return found
