"""What an answer can be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from app.rewards.numbers import Number


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or a formula, with its unit (empty if none is written)."""

    text: str
    number: Number | None
    formula: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """An answer that is no mathematics, in lower case."""

    text: str
    words: str


@dataclass(frozen=True, slots=True)
class Based:
    """Digits in a base that is written with them."""

    text: str
    digits: str
    base: int


@dataclass(frozen=True, slots=True)
class Named:
    """`name = value` or `name` in `value`."""

    text: str
    name: str
    value: Answer


@dataclass(frozen=True, slots=True)
class Group:
    """Several answers: a set `{}`, two of one `±`, a union, a matrix, a list in a pair of brackets or without any."""

    text: str
    kind: str
    items: tuple[Answer, ...]


Answer: TypeAlias = Quantity | Words | Based | Named | Group
