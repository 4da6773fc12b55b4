"""Solves reasoning-gym tasks step by step, with random mistakes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, TypeAlias

import numpy as np
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from datamodules.errors import UserError

ANSWER_MARKER = "#### "
"""Comes before the final answer, as in GSM8K; the reward reads what follows it."""

SLIPS = (-10, -2, -1, 1, 2, 10)
"""Errors of a wrong number: a miscount or a forgotten carry."""

Metadata: TypeAlias = Mapping[str, Any]
"""`entry["metadata"]` of reasoning-gym, whose keys depend on the task."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A worked solution.

    Attributes:
        work: the steps as text; each writes its operands.
        answer: result of the last step.
        slips: number of wrong steps. The steps after a slip continue from the wrong value.
    """

    work: str
    answer: str
    slips: int

    @property
    def text(self) -> str:
        """The completion to learn, without the end token."""
        return f"{self.work}{ANSWER_MARKER}{self.answer}"


class Slips:
    """Makes steps wrong, independently, with probability `noise`, and counts the wrong ones."""

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        self.noise, self.rng = noise, rng
        self.count = 0

    def occurs(self) -> bool:
        """Draw whether the next step is wrong."""
        slip = self.rng.random() < self.noise
        self.count += slip
        return slip

    def wrong(self, value: int) -> int:
        """Return a wrong value near `value`, uniform over `SLIPS`."""
        return value + SLIPS[int(self.rng.integers(len(SLIPS)))]

    def step(self, value: int) -> int:
        """Return the result of a step whose correct value is given."""
        return self.wrong(value) if self.occurs() else value


def chain_sum(metadata: Metadata, slips: Slips) -> tuple[str, str]:
    """Add up many terms from the left: `4 - 1 - 7` becomes `4-1=3-7=-4`.

    One step per term after the first: the running total, the signed term, the new total.
    """
    first, *rest = metadata["expression"].split()
    total, work = int(first), first
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        total = slips.step(total + int(term) if sign == "+" else total - int(term))
        work += f"{sign}{term}={total}"
    return work, str(total)


def complex_arithmetic(metadata: Metadata, slips: Slips) -> tuple[str, str]:
    """Compute with complex numbers part by part: `(1 - 2i) × (3 + 4i)` becomes
    `1*3=3,-2*4=-8,3--8=11,1*4=4,-2*3=-6,4+-6=-2`.

    One step for each part of a sum or difference; for each part of a product, two products and their sum.
    """
    (a, b), (c, d) = ([int(part) for part in metadata[name]] for name in ("num1", "num2"))
    operations = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    work: list[str] = []

    def step(left: int, sign: str, right: int) -> int:
        value = slips.step(operations[sign](left, right))
        work.append(f"{left}{sign}{right}={value}")
        return value

    sign = metadata["operation"]
    if sign in ("+", "-"):
        real, imaginary = step(a, sign, c), step(b, sign, d)
    elif sign == "*":
        real = step(step(a, "*", c), "-", step(b, "*", d))
        imaginary = step(step(a, "*", d), "+", step(b, "*", c))
    else:
        raise UserError(f"complex_arithmetic cannot demonstrate the operation {sign!r}. Use only +, - and *.")
    return ",".join(work), f"{real}{imaginary:+}i"


def leg_counting(metadata: Metadata, slips: Slips) -> tuple[str, str]:
    """Count legs in a word problem: `3 cats, 2 spiders` becomes `3*4=12,2*8=16=28`.

    One step per kind of animal: their number, the legs of one, the product, and (from the second on) the total so
    far. Where a step has both product and total, a slip is equally likely in either.
    """
    total, work = 0, []
    for position, (animal, count) in enumerate(metadata["animals"].items()):
        product = count * ANIMALS[animal]
        slip = slips.occurs()
        in_product = slip and (position == 0 or slips.rng.random() < 0.5)
        product = slips.wrong(product) if in_product else product
        total += product
        total = slips.wrong(total) if slip and not in_product else total
        work.append(f"{count}*{ANIMALS[animal]}={product}" + (f"={total}" if position else ""))
    return ",".join(work), str(total)


def simple_equations(metadata: Metadata, slips: Slips) -> tuple[str, str]:
    """Solve a linear equation in one unknown: `17 - 5*x = 2` becomes `2-17=-15,-15/-5=3`.

    At most two steps: move the constant to the other side, then divide by the coefficient. A step with nothing to do
    (no constant, coefficient 1) is left out. After a wrong constant the quotient may not be whole; it is rounded down.
    """
    coefficient, constant, value = linear(metadata["equation"], metadata["variable"])
    work = []
    if constant != 0:
        before, value = value, slips.step(value - constant)
        work.append(f"{before}-{constant}={value}")
    if coefficient != 1:
        before, value = value, slips.step(value // coefficient)
        work.append(f"{before}/{coefficient}={value}")
    return ",".join(work), str(value)


def linear(equation: str, variable: str) -> tuple[int, int, int]:
    """Return (a, b, c) of `a*x + b = c`, with the terms on the left in any order.

    Raises:
        UserError: the left side is not linear in `variable` with whole numbers.
    """
    left, _, right = equation.replace(" ", "").partition("=")
    coefficient = constant = 0
    for term in re.findall(r"[+-]?[^+-]+", left):
        times, unknown, rest = term.partition(variable)
        digits = times.removesuffix("*")
        if rest or not re.fullmatch(r"[+-]?\d*" if unknown else r"[+-]?\d+", digits):
            raise UserError(
                f"The equation {equation!r} is not linear on the left. Use whole multiples of {variable} and numbers."
            )
        if unknown:
            coefficient += int(digits if digits.strip("+-") else f"{digits}1")
        else:
            constant += int(digits)
    if coefficient == 0:
        raise UserError(f"The equation {equation!r} has no {variable} on the left. Use an equation that has one.")
    return coefficient, constant, int(right)


def spell_backward(metadata: Metadata, slips: Slips) -> tuple[str, str]:
    """Spell a word from its end, one letter per step: `sun` becomes `n,u,s`. A slip writes another letter."""
    letters = list(reversed(metadata["word"]))
    for position, letter in enumerate(letters):
        if slips.occurs():
            others = ascii_lowercase.replace(letter.lower(), "")
            letters[position] = others[int(slips.rng.integers(len(others)))]
    return ",".join(letters), "".join(letters)


DEMONSTRATORS: dict[str, Callable[[Metadata, Slips], tuple[str, str]]] = {
    "chain_sum": chain_sum,
    "complex_arithmetic": complex_arithmetic,
    "leg_counting": leg_counting,
    "simple_equations": simple_equations,
    "spell_backward": spell_backward,
}
"""By task, a function that returns the work and the answer for an entry's metadata."""


def demonstrate(task: str, metadata: Metadata, noise: float, rng: np.random.Generator) -> Solution:
    """Solve an entry of a task of `DEMONSTRATORS`; each step is independently wrong with probability `noise`."""
    slips = Slips(noise, rng)
    work, answer = DEMONSTRATORS[task](metadata, slips)
    return Solution(work, answer, slips.count)
