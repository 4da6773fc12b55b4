"""MoPPS: Thompson sampling from a Beta posterior per prompt (Qu et al. 2025, arXiv 2507.04632)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from datamodules.difficulty.outcomes import question_key, read_outcomes
from datamodules.errors import UserError, nearest
from datamodules.jsonl import parse_object
from datamodules.pool import PromptPool
from datamodules.selectors.base import NO_PROMPTS, Ranker, SelectionContext
from datamodules.selectors.sampling import pass_ranks
from datamodules.types import Outcomes

Strategy = Literal["topk", "threshold"]

log = logging.getLogger(__name__)


class Mopps(Ranker):
    """Chooses the candidates whose sampled success rate is nearest to the target, or lies in a band.

    The candidates are the next prompts of the shuffled pool. An outcome updates a prompt's posterior to
    Beta(lambda a + (1 - lambda) a0 + successes, lambda b + (1 - lambda) b0 + failures). If filters leave too few
    candidates, the prompts that follow them are used. Every choice, also a refill, moves on to new candidates.

    `offline` starts the posterior at Beta(a0 + w p, b0 + w (1 - p)) where a rate p was measured before the run, with
    the weight w; forgetting still returns to a0 and b0. The strategies and this start are options of the authors' code.

    Args:
        strategy: "topk" takes the candidates whose sampled rate is nearest to the target; "threshold" takes any with a
            rate in [lower, upper], at random, then those nearest to that band.
        target: success rate that "topk" aims at, in [0, 1].
        lower: lowest rate that "threshold" looks for, in [0, 1].
        upper: highest rate that "threshold" looks for, in [0, 1].
        decay: lambda in [0, 1], the share of the past that a new outcome keeps; 1 forgets nothing.
        prior_successes: a0 > 0.
        prior_failures: b0 > 0.
        candidates: candidates per chosen prompt (8 to 16 in the paper); 0 makes the whole pool candidates.
        offline: success rates measured before the run: a record that `dots difficulty fit` reads, such as the
            completions of `dots predict`, matched by the question, or a JSON file of one rate or a list of scores by
            prompt id, as the authors write it; null for none.
        offline_weight: completions that a rate of `offline` counts as, >= 0 (three times those that measured it in the
            authors' code).
    """

    def __init__(
        self,
        target: float = 0.5,
        decay: float = 1.0,
        prior_successes: float = 1.0,
        prior_failures: float = 1.0,
        candidates: int = 16,
        strategy: Strategy = "topk",
        lower: float = 0.3,
        upper: float = 0.7,
        offline: str | None = None,
        offline_weight: float = 24.0,
    ) -> None:
        super().__init__()
        if strategy not in get_args(Strategy):
            raise UserError(f"strategy is {strategy!r}: {nearest(str(strategy), get_args(Strategy))}")
        if not 0 <= lower <= upper <= 1:
            raise UserError(
                f"lower={lower} and upper={upper} are not a band of success rates, expected 0 <= lower <= upper <= 1. "
                "Use 0.3 and 0.7."
            )
        if not 0 <= offline_weight < np.inf:
            raise UserError(
                f"offline_weight is {offline_weight}, expected a number of completions >= 0. Use e.g. three times the "
                "completions that measured a rate."
            )
        if not 0 <= target <= 1:
            raise UserError(f"target is {target}, expected a success rate in [0, 1]. Use 0.5 for informative prompts.")
        if not 0 <= decay <= 1:
            raise UserError(f"decay is {decay}, expected lambda in [0, 1]. Use 1 to forget nothing.")
        if not (prior_successes > 0 and prior_failures > 0):
            raise UserError(
                f"prior_successes={prior_successes} and prior_failures={prior_failures} are not a Beta prior, expected "
                "both > 0. Use 1 for both."
            )
        if candidates < 0:
            raise UserError(
                f"candidates is {candidates}, expected a number per chosen prompt >= 0. Use 0 for the whole pool."
            )
        self.target, self.decay = target, decay
        self.prior = np.array([prior_successes, prior_failures])
        self.candidates = candidates
        self.strategy, self.lower, self.upper = strategy, lower, upper
        self.offline, self.offline_weight = offline, offline_weight
        self._counts: np.ndarray
        """float64 `[2, Q]`: a and b of every prompt."""
        self._met = 0
        """Places that earlier choices have used up in the endless sequence of shuffled passes."""

    def setup(self, pool: PromptPool, context: SelectionContext) -> None:
        super().setup(pool, context)
        self._counts = np.repeat(self.prior[:, None], len(pool), axis=1)
        if self.offline is not None:
            rates = _offline_rates(Path(self.offline).expanduser(), pool)
            known = np.isfinite(rates)
            self._counts[:, known] += self.offline_weight * np.stack([rates, 1 - rates])[:, known]

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        size, method = len(self.pool), type(self).__name__
        number, within = divmod(self._met, size)
        # How many places lie before each prompt's next one.
        ahead = pass_ranks(self._seed, method, number, size)
        if within:
            following = pass_ranks(self._seed, method, number + 1, size) + size
            ahead = np.where(ahead >= within, ahead, following) - within
        near = np.flatnonzero(ahead < self._window(n))
        values = -1.0 - ahead
        sampled = rng.beta(*self._counts[:, near])
        # A band of no width around the target makes both strategies one.
        low, high = (self.target, self.target) if self.strategy == "topk" else (self.lower, self.upper)
        values[near] = -np.maximum(np.maximum(low - sampled, sampled - high), 0.0)
        return values

    def settle(self, chosen: np.ndarray, passed_over: np.ndarray = NO_PROMPTS) -> None:
        self._met += self._window(len(chosen))

    def _window(self, n: int) -> int:
        return min(self.candidates * n, len(self.pool)) if self.candidates else len(self.pool)

    def learn(self, positions: np.ndarray, outcomes: Outcomes) -> None:
        successes = outcomes.success_rate * outcomes.samples
        seen = np.stack([successes, outcomes.samples - successes])
        kept = self.decay * self._counts[:, positions] + (1 - self.decay) * self.prior[:, None]
        # A shaped correctness reward may leave [0, 1], Beta counts must not.
        self._counts[:, positions] = kept + np.clip(seen, 0, outcomes.samples)

    def forecast(self) -> np.ndarray:
        return self._counts[0] / self._counts.sum(0)

    def forecast_deviation(self) -> np.ndarray:
        mean = self.forecast()
        return np.sqrt(mean * (1 - mean) / (self._counts.sum(0) + 1))

    def metrics(self) -> dict[str, float]:
        return {
            "selection/posterior_mean": float(self.forecast().mean()),
            "selection/posterior_std": float(self.forecast_deviation().mean()),
        }

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": torch.from_numpy(self._counts.copy()), "met": self._met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._counts, self._met = state["counts"].numpy().copy(), state["met"]


def _offline_rates(path: Path, pool: PromptPool) -> np.ndarray:
    """Return the recorded success rate of every prompt, float64 `[Q]`, NaN where there is none.

    Raises:
        UserError: the file cannot be read, or knows no prompt of the pool.
    """
    if path.suffix == ".json":
        by_key, keys = _scores_by_id(path), list(pool.ids)
    else:
        if not path.exists():
            raise UserError(f"Mopps.offline is {str(path)!r}, which does not exist. Name a record of success rates.")
        outcomes = read_outcomes(path)
        by_key = dict(zip(map(question_key, outcomes.questions), np.clip(outcomes.means, 0.0, 1.0), strict=True))
        keys = [question_key(question) for question in pool.questions]
    rates = np.array([by_key.get(key, np.nan) for key in keys], dtype=np.float64)
    known = int(np.isfinite(rates).sum())
    if not known:
        raise UserError(
            f"Mopps.offline {str(path)!r} has {len(by_key)} rates, but of none of the {len(pool)} training prompts. "
            "Name a record of these prompts, or set offline to null."
        )
    if known < len(pool):
        log.warning(
            "selectors.Mopps: %s has rates of %d of %d prompts; the others start at the prior.", path, known, len(pool)
        )
    return rates


def _scores_by_id(path: Path) -> Mapping[str, float]:
    """Read the mean score of every prompt id from a JSON object of scores, or lists of them, in [0, 1]."""
    try:
        given = parse_object(path.read_bytes(), repr(str(path)))
    except OSError as error:
        raise UserError(f"Mopps.offline is {str(path)!r}, which cannot be read ({error.strerror}).") from error
    found = {}
    for name, scores in given.items():
        listed = scores if isinstance(scores, list) else [scores]
        if not listed or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in listed):
            raise UserError(
                f"Mopps.offline {str(path)!r} has {str(scores)[:40]!r} for {name!r}, expected a rate or a list of "
                'scores in [0, 1], such as {"0": [1, 0, 0, 1]}. Correct it.'
            )
        found[name] = float(np.mean(listed))
    return found
