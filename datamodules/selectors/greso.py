"""GRESO: skip prompts with repeated zero-variance groups (Zheng et al. 2025, arXiv 2506.02177)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.composed import Composed, Filter
from datamodules.selectors.uniform import Uniform
from datamodules.types import REWARD_TOLERANCE, Outcomes

_LOWEST, _HIGHEST = 0.05, 0.95


class ZeroVarianceSkip(Filter):
    """GRESO's skip rule, for any ranker.

    A prompt whose latest z groups were all right is admitted with probability `max(p_easy^z, min_keep)`, after z
    all-wrong groups with `max(p_hard^z, min_keep)`; any other prompt is always admitted. After the first epoch (as many
    groups rolled out as the pool has prompts), each of p_easy and p_hard moves by `step_size` per training step: down
    if that class's share of the step's groups is at or above its target, else up, within [0.05, 0.95]. Reference groups
    count for the runs, but not as rollouts.

    Three rules differ from the authors' code. A group is all right or wrong only if every completion is; theirs counts
    rates from 0.98 and up to 0.11 (the same up to 8 completions). The probabilities first move in the step after the
    first epoch; theirs in the step that ends it. `refill_size` rounds up and uses the share of the whole step; theirs
    rounds down, asks for at least 64 prompts even where a step chooses fewer, and uses the share of the last refill.

    Args:
        p_easy: initial probability of keeping a prompt after one all-right group, in [0.05, 0.95].
        p_hard: initial probability of keeping a prompt after one all-wrong group, in [0.05, 0.95].
        target_easy: target share of all-right groups among those rolled out, in [0, 1]; 1/12 in the paper.
        target_hard: target share of all-wrong groups, in [0, 1]; 1/6 in the paper.
        step_size: change of a probability per training step, >= 0.
        min_keep: lower bound of the keep probability, in (0, 1]: every prompt stays reachable.
        min_refill: smallest refill in prompts, >= 1.
        refill_margin: factor on the expected number of prompts that a refill needs, >= 1.
    """

    def __init__(
        self,
        p_easy: float = 0.5,
        p_hard: float = 0.5,
        target_easy: float = 1 / 12,
        target_hard: float = 1 / 6,
        step_size: float = 0.01,
        min_keep: float = 0.01,
        min_refill: int = 64,
        refill_margin: float = 1.25,
    ) -> None:
        for name, value in (("p_easy", p_easy), ("p_hard", p_hard)):
            if not _LOWEST <= value <= _HIGHEST:
                raise UserError(f"{name} is {value}, expected a probability in [{_LOWEST}, {_HIGHEST}]. Use e.g. 0.5.")
        for name, value in (("target_easy", target_easy), ("target_hard", target_hard)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} is {value}, expected a share of the groups in [0, 1]. Change it.")
        if not 0 < min_keep <= 1:
            raise UserError(f"min_keep is {min_keep}, expected a probability in (0, 1]. Use e.g. 0.01.")
        if step_size < 0 or min_refill < 1 or refill_margin < 1:
            raise UserError(
                f"step_size={step_size}, min_refill={min_refill} and refill_margin={refill_margin} are out of range, "
                "expected step_size >= 0, min_refill >= 1 and refill_margin >= 1. Change them."
            )
        self.p_easy, self.p_hard = p_easy, p_hard
        self.target_easy, self.target_hard = target_easy, target_hard
        self.step_size, self.min_keep = step_size, min_keep
        self.min_refill, self.refill_margin = min_refill, refill_margin
        self._run = NO_PROMPTS
        """int64 `[Q]`: +z after z all-right groups in a row, -z after z all-wrong ones, else 0."""
        self._rolled_out = 0
        self._step_groups = self._step_easy = self._step_hard = 0

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        self._run = np.zeros(len(pool), dtype=np.int64)

    def keep_probability(self) -> np.ndarray:
        """Return the probability that each prompt is admitted, float64 `[Q]`."""
        base = np.where(self._run > 0, self.p_easy, self.p_hard)
        return np.maximum(base ** np.abs(self._run), self.min_keep)

    def admits(self, rng: np.random.Generator) -> np.ndarray:
        return rng.random(len(self._run)) < self.keep_probability()

    def begin_step(self) -> None:
        if self._step_groups and self._rolled_out - self._step_groups >= len(self._run):
            self.p_easy = self._moved(self.p_easy, self._step_easy / self._step_groups, self.target_easy)
            self.p_hard = self._moved(self.p_hard, self._step_hard / self._step_groups, self.target_hard)
        self._step_groups = self._step_easy = self._step_hard = 0

    def _moved(self, probability: float, share: float, target: float) -> float:
        moved = probability + (-self.step_size if share >= target else self.step_size)
        return min(max(moved, _LOWEST), _HIGHEST)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        easy = outcomes.success_rate >= 1 - REWARD_TOLERANCE
        hard = outcomes.success_rate <= REWARD_TOLERANCE
        run = self._run[positions]
        self._run[positions] = np.where(easy, np.maximum(run, 0) + 1, np.where(hard, np.minimum(run, 0) - 1, 0))
        if outcomes.source == "fresh":
            self._rolled_out += len(positions)
            self._step_groups += len(positions)
            self._step_easy += int(easy.sum())
            self._step_hard += int(hard.sum())

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        """Return the paper's adaptive rollout batch, enough prompts for the missing groups plus a margin.

        min(default, max(min_refill, refill_margin * missing / (1 - zero_variance_ratio))), rounded up.
        """
        if kept_fraction <= 0:
            return default
        # The slack keeps a rounding error from adding a prompt.
        expected = math.ceil(self.refill_margin * missing / kept_fraction - 1e-9)
        return min(default, max(self.min_refill, expected))

    def metrics(self) -> dict[str, float]:
        return {
            "selection/p_easy": self.p_easy,
            "selection/p_hard": self.p_hard,
            "selection/skip_fraction": float(1 - self.keep_probability().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "p_easy": self.p_easy,
            "p_hard": self.p_hard,
            "run": torch.from_numpy(self._run.copy()),
            "rolled_out": self._rolled_out,
            "step_counts": [self._step_groups, self._step_easy, self._step_hard],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.p_easy, self.p_hard = state["p_easy"], state["p_hard"]
        self._run, self._rolled_out = state["run"].numpy().copy(), state["rolled_out"]
        self._step_groups, self._step_easy, self._step_hard = state["step_counts"]


class Greso(Composed):
    """GRESO as published: shuffled passes over the pool in which each prompt may be skipped.

    A skipped prompt has had its turn in the pass. Use it with `callbacks.DynamicSampling`, which drops the remaining
    zero-variance groups and asks `refill_size` for the number of prompts to roll out instead. The authors' scripts
    first choose one and a half batches of prompts, here a step first chooses as many as it needs.

    Args:
        ranker: orders the prompts; null for shuffled passes over the pool, as published.
        cool_down: number of steps for which a chosen prompt is not chosen again, >= 0.
        explore: share of all choices that is drawn uniformly, in [0, 1].
        skip: arguments of `ZeroVarianceSkip`.
    """

    def __init__(self, ranker: Ranker | None = None, cool_down: int = 0, explore: float = 0.0, **skip: Any) -> None:
        self.skip = ZeroVarianceSkip(**skip)
        super().__init__(ranker or Uniform(), [self.skip], cool_down, explore)
