"""What goes wrong while completions are scored, told in one line per step."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.rewards.workers.pool import WorkerOptions
from app.rewards.workers.task import CallResult, Failure

logger = logging.getLogger("dots.rewards")

STEPS_WITHOUT_MATCH = 10
"""Steps after which a pattern that no completion has matched is named."""


@dataclass
class _OfReward:
    """What has gone wrong with one reward since the last report."""

    failed: Counter[str] = field(default_factory=Counter)
    first: str = ""
    traceback: str = ""
    overran: int = 0


class Incidents:
    """Counts failures by reward until they are reported, and keeps the first cause of each.

    Args:
        names: names of the rewards.
        options: the limits that messages name.
        patterns: patterns of the rewards that are about a completion's form, by name.
    """

    def __init__(self, names: Sequence[str], options: WorkerOptions, patterns: Mapping[str, str] | None = None) -> None:
        self._names, self._options = names, options
        self._unmatched = dict(patterns or {})
        self._reports_without_match = 0
        self._told: set[str] = set()
        self._last = ""
        self._begin()

    def _begin(self) -> None:
        self._rewards = {name: _OfReward() for name in self._names}
        self._completions = self._unscored = self._environments = 0
        self._first_unscored = self.first_environment = ""

    def add(
        self,
        by_reward: Sequence[CallResult],
        labels: Sequence[str],
        texts: Sequence[str],
        unscored: np.ndarray,
        errors: Sequence[str] = (),
    ) -> None:
        """Record the results of a scoring.

        Args:
            by_reward: the results of each reward for `N` completions.
            labels: names of the completions.
            texts: the completions.
            unscored: bool `[N]`: those without a correctness score.
            errors: why the environment of each failed; empty where it did not.
        """
        self._completions += len(labels)
        self._last = texts[-1] if texts else self._last
        if unscored.any():
            self._first_unscored = self._first_unscored or labels[int(unscored.argmax())]
            self._unscored += int(unscored.sum())
        if failed := [row for row, error in enumerate(errors) if error]:
            self._environments += len(failed)
            told = f"{labels[failed[0]]} ({texts[failed[0]][:80]!r}): {errors[failed[0]]}"
            self.first_environment = self.first_environment or told
        for name, result in zip(self._names, by_reward, strict=True):
            mine = self._rewards[name]
            mine.overran += result.overran
            mine.failed.update(failure.kind for failure in result.failures.values())
            if any(result.scores):
                self._unmatched.pop(name, None)
            if result.failures and not mine.first:
                row = min(result.failures)
                mine.first, mine.traceback = _cause(result.failures[row], labels[row], texts[row])
            for note in result.notes:
                self._once(f"Reward {name!r}: {note}.")

    def first_cause(self, name: str) -> str | None:
        """Return what the first failure of a reward since the last report was, or None."""
        return self._rewards[name].first or None

    def report(self, where: str) -> None:
        """Log one line about everything since the last report, and the first traceback of each reward once.

        Args:
            where: the beginning of the line, e.g. "Step 3".
        """
        parts = []
        limit = f"model.reward_workers.time_limit_s={self._options.time_limit_s:g} s"
        for name, mine in self._rewards.items():
            if mine.overran:
                parts.append(
                    f"reward {name!r} took more than {limit} for calls of {mine.overran} completions, which were "
                    "scored again one by one: raise it, lower model.reward_workers.chunk_size, or yield the scores"
                )
            if failed := mine.failed.total():
                kinds = f"{mine.failed['timed_out']} took too long, {mine.failed['crashed']} crashed"
                parts.append(
                    f"reward {name!r} failed on {failed} of {self._completions} completions ({kinds}), first on "
                    f"{mine.first}"
                )
        if self._environments:
            parts.append(
                f"the environment failed in {self._environments} of {self._completions} conversations, first in that "
                f"of {self.first_environment}"
            )
        if parts:
            logger.warning("%s: %s.", where, "; ".join(parts))
        if self._unscored:
            self._once(
                f"{where}: no correctness reward applies to {self._unscored} of {self._completions} completions, the "
                f"first of which is {self._first_unscored}. They are left out. rewards/unscored_fraction and "
                "val/unscored_fraction count them from now on.",
                "unscored",
            )
        self._reports_without_match += bool(self._completions)
        if self._reports_without_match >= STEPS_WITHOUT_MATCH:
            for name, pattern in self._unmatched.items():
                self._once(
                    f"{where}: the pattern {pattern!r} of reward {name!r} has matched no completion yet, the last is "
                    f"{self._last[:80]!r}. If the chat template opens <think> itself, completions do not contain it.",
                    f"pattern {name}",
                )
        for name, mine in self._rewards.items():
            if mine.traceback:
                self._once(f"First traceback of reward {name!r}:\n{mine.traceback}", f"traceback {name}")
        self._begin()

    def _once(self, line: str, topic: str | None = None) -> None:
        if (topic or line) not in self._told:
            self._told.add(topic or line)
            logger.warning(line)


def _cause(failure: Failure, label: str, text: str) -> tuple[str, str]:
    """Return one line that names a failure and its completion, and the traceback."""
    return f"{label} ({text[:80]!r}): {failure.error}", failure.traceback
