"""Sums, differences and products of complex numbers, part by part: `(1 - 2i) × (3 + 4i)` is worked as
`1*3=3,-2*4=-8,3--8=11,1*4=4,-2*3=-6,4+-6=-2`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.demonstrations.base import Solution, slipped
from datamodules.errors import UserError

_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


class ComplexArithmetic:
    """One step for each part of a sum or difference; a product has two products and their sum for each part."""

    task = "complex_arithmetic"

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        (a, b), (c, d) = ([int(part) for part in metadata[name]] for name in ("num1", "num2"))
        sign = metadata["operation"]
        work = _Work(noise, rng)
        if sign in ("+", "-"):
            real, imaginary = work.step(a, sign, c), work.step(b, sign, d)
        elif sign == "*":
            real = work.step(work.step(a, "*", c), "-", work.step(b, "*", d))
            imaginary = work.step(work.step(a, "*", d), "+", work.step(b, "*", c))
        else:
            raise UserError(f"complex_arithmetic with the operation {sign!r}: demonstrated are +, - and *")
        return Solution(",".join(work.steps), f"{real}{imaginary:+}i", work.slips)


class _Work:
    """The steps so far, each wrong with probability `noise`."""

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        self.noise, self.rng = noise, rng
        self.steps: list[str] = []
        self.slips = 0

    def step(self, left: int, sign: str, right: int) -> int:
        value = _OPERATIONS[sign](left, right)
        if self.rng.random() < self.noise:
            value, self.slips = slipped(value, self.rng), self.slips + 1
        self.steps.append(f"{left}{sign}{right}={value}")
        return value
