"""A word problem: `3 cats, 2 spiders` is worked as `3*4=12,2*8=16=28`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from datamodules.demonstrations.base import Solution, slipped


class LegCounting:
    """One step per kind of animal: how many, legs of one, their product, and (from the second on) the total so far.

    A slip falls on the product or on the total, either being as likely where the step has both.
    """

    task = "leg_counting"

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        total, steps, slips = 0, [], 0
        for position, (animal, count) in enumerate(metadata["animals"].items()):
            product = count * ANIMALS[animal]
            slip = rng.random() < noise
            in_product = slip and (position == 0 or rng.random() < 0.5)
            slips += slip
            product = slipped(product, rng) if in_product else product
            total += product
            total = slipped(total, rng) if slip and not in_product else total
            steps.append(f"{count}*{ANIMALS[animal]}={product}" + (f"={total}" if position else ""))
        return Solution(",".join(steps), str(total), slips)
