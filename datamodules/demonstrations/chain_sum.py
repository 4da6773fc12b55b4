"""Sums and differences of many terms, added up from the left: `4 - 1 - 7` is worked as `4-1=3-7=-4`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from datamodules.demonstrations.base import Solution, slipped


class ChainSum:
    """One step per term after the first: the running total, the signed term, the new total."""

    task = "chain_sum"

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        first, *rest = metadata["expression"].split()
        total, work, slips = int(first), first, 0
        for sign, term in zip(rest[::2], rest[1::2], strict=True):
            total += int(term) if sign == "+" else -int(term)
            if rng.random() < noise:
                total, slips = slipped(total, rng), slips + 1
            work += f"{sign}{term}={total}"
        return Solution(work, str(total), slips)
