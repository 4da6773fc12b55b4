"""When no group teaches anything for many steps: what the rollouts show, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from datamodules.types import RolloutGroup

LIMIT = 10
"""Steps in a row without an informative group before it is said; then again whenever their number has doubled."""
_NEARLY_ALL = 0.95


class UninformativeSteps:
    """Counts steps in a row whose groups were all right, all wrong, or without a score."""

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._steps = 0
        self._next = LIMIT
        self._right: list[float] = []
        self._cut: list[float] = []

    def step(self, step: int, groups: Sequence[RolloutGroup]) -> None:
        """Takes in the groups that a step trains on, and warns when it is time."""
        if any(group.informative for group in groups):
            self._begin()
            return
        self._steps += 1
        self._right += [float(value) for group in groups for value in group.correctness]
        self._cut += [float(one.finish_reason == "length") for group in groups for one in group.completions]
        if self._steps >= self._next:
            rank_zero_warn(f"step {step}: no group of the last {self._steps} steps was informative: {self._advice()}")
            self._next *= 2

    def _advice(self) -> str:
        if not self._right:
            return "no completion was scored; see the warnings about the reward, and rewards/crashed and timed_out"
        right, cut = float(np.mean(self._right)), float(np.mean(self._cut))
        seen = f"{right:.0%} of their completions were right, {cut:.0%} were cut at the length limit; "
        if right >= _NEARLY_ALL:
            return seen + "the prompts are too easy for the policy: give harder ones"
        if right > 1 - _NEARLY_ALL:
            return seen + (
                "prompts are all right or all wrong: raise model.sampling.num_generations, or choose prompts between "
                "the two (data.selector: datamodules.selectors.Dots)"
            )
        if cut >= 0.5:
            return seen + "they end before their answer: raise model.sampling.max_completion_length"
        return seen + (
            "the prompts are too hard for the policy, or the reward does not find its answers: read "
            "completions/*.parquet beside the reference answers, then give easier prompts or mend the reward's options"
        )
