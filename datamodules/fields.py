"""Format strings whose fields are names of values: `{question}`, `{reward_model.ground_truth}`."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence


class _Fields(string.Formatter):
    """Takes the text between braces as the name of a value: no attribute or element of it can be reached."""

    def get_field(self, field_name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> tuple[object, str]:
        return kwargs[field_name], field_name


_FORMATTER = _Fields()


def fields_of(template: str) -> set[str]:
    """Return the names of a format string's fields. Raises ValueError if it is none."""
    return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}


def filled(template: str, values: Mapping[str, object]) -> str:
    """Return a format string with its fields' values, which are not read as format strings themselves."""
    return _FORMATTER.vformat(template, (), values)
