"""Solves reasoning-gym tasks with a calculator, one call per step, with bad habits."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from datamodules.demonstrations.solutions import ANSWER_MARKER, Metadata, Slips

OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}

Calculation: TypeAlias = Generator[tuple[int, str, int], int, int]
"""Yields operations, is sent the result of each, and returns the answer."""


@dataclass(frozen=True)
class Calls:
    """How a demonstration calls the calculator: `<calc>37*48</calc>`, and the calculator answers `=1776\\n`.

    Args:
        start: text before an operation.
        end: text after it, at which the policy's turn ends.
        reply: what the calculator answers, with `{content}` for the result.
        unaided: which of the wrong steps are results that the policy wrote without a call; the others are calls with a
            wrong digit.
    """

    start: str = "<calc>"
    end: str = "</calc>"
    reply: str = "={content}\n"
    unaided: float = 0.5

    def answer(self, text: str) -> str:
        """Return the calculator's reply to the last call of a text that ends with one."""
        found = re.fullmatch(r"(-?\d+)([-+*])(-?\d+)", text.removesuffix(self.end).rpartition(self.start)[2])
        result = OPERATIONS[found[2]](int(found[1]), int(found[3])) if found else "error"
        return self.reply.format(content=result)


@dataclass(frozen=True, slots=True)
class Conversation:
    """A solution with calls.

    Attributes:
        turns: texts of the policy (the first, the third ...) and the calculator's replies between them.
        answer: result of the last step.
        slips: number of wrong steps. The steps after a slip continue from the wrong value.
    """

    turns: tuple[str, ...]
    answer: str
    slips: int


def chain_sum(metadata: Metadata) -> Calculation:
    """Add up from the left."""
    first, *rest = metadata["expression"].split()
    total = int(first)
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total = yield total, sign, int(term)
    return total


def leg_counting(metadata: Metadata) -> Calculation:
    """Multiply the legs of each kind of animal by their number, and add the product to the total so far."""
    total: int | None = None
    for animal, count in metadata["animals"].items():
        product = yield count, "*", ANIMALS[animal]
        total = product if total is None else (yield total, "+", product)
    return total or 0


CALCULATIONS: dict[str, Callable[[Metadata], Calculation]] = {
    "chain_sum": chain_sum,
    "leg_counting": leg_counting,
    "products": chain_sum,  # `12 * 34 * 56` has the form of a sum
}
"""By task, the operations for an entry's metadata."""


def converse(task: str, metadata: Metadata, noise: float, calls: Calls, rng: np.random.Generator) -> Conversation:
    """Solve an entry of a task of `CALCULATIONS`; each step is independently wrong with probability `noise`.

    A step is a call and its reply, or the same operation and result written without the calculator.
    """
    slips, turns, said = Slips(noise, rng), list[str](), ""
    calculation = CALCULATIONS[task](metadata)
    result: int | None = None
    while True:
        try:
            left, sign, right = next(calculation) if result is None else calculation.send(result)
        except StopIteration as finished:
            answer = str(finished.value)
            return Conversation((*turns, f"{said}{ANSWER_MARKER}{answer}"), answer, slips.count)
        slip = slips.occurs()
        if slip and rng.random() < calls.unaided:
            result = slips.wrong(OPERATIONS[sign](left, right))
            said += f"{left}{sign}{right}{calls.reply.format(content=result)}"
            continue
        if slip and rng.random() < 0.5:
            left = _misread(left, rng)
        elif slip:
            right = _misread(right, rng)
        result = OPERATIONS[sign](left, right)
        turns += [f"{said}{calls.start}{left}{sign}{right}{calls.end}", calls.reply.format(content=result)]
        said = ""


def _misread(value: int, rng: np.random.Generator) -> int:
    """Return the number with one digit replaced by another one."""
    text = str(value)
    place = int(rng.integers(value < 0, len(text)))
    digit = (int(text[place]) + int(rng.integers(1, 10))) % 10
    return int(f"{text[:place]}{digit}{text[place + 1 :]}")
