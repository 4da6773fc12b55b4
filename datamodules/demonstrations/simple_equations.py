"""Linear equations in one unknown: `17 - 5*x = 2` is worked as `2-17=-15,-15/-5=3`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.demonstrations.base import Solution, slipped
from datamodules.errors import UserError


class SimpleEquations:
    """At most two steps: the constant goes to the other side, then the division by the coefficient.

    A step that has nothing to do (no constant, coefficient 1) is left out; an equation without either has no work. A
    wrong constant may leave a division with a remainder: its quotient is rounded down.
    """

    task = "simple_equations"

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        coefficient, constant, value = linear(metadata["equation"], metadata["variable"])
        steps, slips = [], 0
        for needed, sign, operand in ((constant != 0, "-", constant), (coefficient != 1, "/", coefficient)):
            if not needed:
                continue
            before, value = value, value - operand if sign == "-" else value // operand
            if rng.random() < noise:
                value, slips = slipped(value, rng), slips + 1
            steps.append(f"{before}{sign}{operand}={value}")
        return Solution(",".join(steps), str(value), slips)


def linear(equation: str, variable: str) -> tuple[int, int, int]:
    """(a, b, c) of `a*x + b = c`, the terms on the left in any order.

    Raises:
        UserError: the left side is not linear in `variable` with whole numbers.
    """
    left, _, right = equation.replace(" ", "").partition("=")
    coefficient = constant = 0
    for term in re.findall(r"[+-]?[^+-]+", left):
        times, unknown, rest = term.partition(variable)
        digits = times.removesuffix("*")
        if rest or not re.fullmatch(r"[+-]?\d*" if unknown else r"[+-]?\d+", digits):
            raise UserError(f"equation {equation!r}: expected whole multiples of {variable} and numbers on the left")
        if unknown:
            coefficient += int(digits if digits.strip("+-") else f"{digits}1")
        else:
            constant += int(digits)
    if coefficient == 0:
        raise UserError(f"equation {equation!r}: {variable} does not occur on the left")
    return coefficient, constant, int(right)
