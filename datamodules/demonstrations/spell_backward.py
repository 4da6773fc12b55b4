"""Spelling from the end, letter by letter: `sun` is worked as `n,u,s`."""

from __future__ import annotations

from collections.abc import Mapping
from string import ascii_lowercase
from typing import Any

import numpy as np

from datamodules.demonstrations.base import Solution


class SpellBackward:
    """One step per letter of the word; a slip writes another letter of the alphabet."""

    task = "spell_backward"

    def solve(self, metadata: Mapping[str, Any], noise: float, rng: np.random.Generator) -> Solution:
        letters, slips = list(reversed(metadata["word"])), 0
        for position, letter in enumerate(letters):
            if rng.random() < noise:
                others = ascii_lowercase.replace(letter.lower(), "")
                letters[position], slips = others[int(rng.integers(len(others)))], slips + 1
        return Solution(",".join(letters), "".join(letters), slips)
