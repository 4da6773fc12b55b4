"""Scoring of completions by a list of rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from app.rewards.base import Reward
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import Call, CallResult, FailureKind, TrainerState
from datamodules.errors import UserError
from datamodules.ledger import Ledger, WeightedMean
from datamodules.seeding import derive_seed
from datamodules.types import Completion, Prompt, RolloutGroup, Source

RESERVED = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)
"""Arguments of reward functions, which a column of the data must not replace."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    """Scored groups, and what happened while they were scored.

    Attributes:
        groups: one per prompt, in order, without the completions that were left out (possibly all of them).
        timed_out: scores that took too long.
        crashed: scores lost to an exception, a dead worker, or a value that is not a finite number.
        unscored: correctness scores that are None; they count as failures, because difficulty is undefined without.
        dropped: completions left out.
        extras: values given to `log_extra` by column: one per remaining completion in the order of `groups`, None where
            none was logged.
        logged: values given to `log_metric`, by `<reward name>/<metric>`, averaged over completions.
    """

    groups: list[RolloutGroup]
    timed_out: int
    crashed: int
    unscored: int
    dropped: int
    extras: Mapping[str, list[Any]]
    logged: Mapping[str, WeightedMean]


class RewardScorer:
    """Scores completions by several rewards, in worker processes.

    The optimized reward is the weighted sum; a reward that returns None contributes nothing (as in TRL).

    Args:
        rewards: rewards, one of which defines how difficult a prompt is: the one marked `correctness`, or else the
            first.
        on_failure: what happens to a completion whose score timed out or crashed: "drop" leaves it out of its group,
            "zero" scores it 0 in the reward that failed.
        workers: worker processes and their limits.

    Raises:
        UserError: no rewards, several marked as correctness, or a weight that is not a finite number.
    """

    def __init__(
        self, rewards: list[Reward], on_failure: Literal["drop", "zero"] = "drop", workers: WorkerOptions | None = None
    ) -> None:
        if on_failure not in ("drop", "zero"):
            raise UserError(f"on_failure is {on_failure!r}, expected 'drop' or 'zero'. Choose one of the two.")
        if not rewards:
            raise UserError(
                "rewards is an empty list, expected at least one reward. Add one, e.g. class_path: app.rewards.Math."
            )
        for reward in rewards:
            if not math.isfinite(reward.weight):
                raise UserError(
                    f"The weight of reward {reward.name!r} is {reward.weight}, expected a finite number. Change it."
                )
        self.rewards = list(rewards)
        self.names = _unique_names(self.rewards)
        self.weights = np.array([reward.weight for reward in rewards], dtype=np.float32)
        marked = [position for position, reward in enumerate(rewards) if reward.correctness]
        if len(marked) > 1:
            names = ", ".join(repr(rewards[position].name) for position in marked)
            raise UserError(
                f"correctness is true for {len(marked)} rewards ({names}), expected one. Remove it from the others."
            )
        self.correctness = marked[0] if marked else 0
        self.on_failure = on_failure
        self.options = workers or WorkerOptions()
        self._workers = RewardWorkers(self.rewards, self.options)

    def start(self) -> None:
        """Start the workers without waiting, so that the first scores do not wait for their imports."""
        self._workers.start()

    def wait_ready(self) -> None:
        """Wait until the workers have loaded the rewards. Raises UserError when a reward cannot be loaded."""
        self._workers.run([])

    def close(self) -> None:
        """Stop the workers. May be called twice."""
        self._workers.close()

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[tuple[Completion, ...]],
        *,
        source: Source,
        step: int,
        state: TrainerState | None = None,
    ) -> ScoreResult:
        """Score the completions of every prompt.

        Args:
            prompts: `B` prompts.
            completions: `B` tuples of completions.
            source: source of the groups.
            step: step in which the completions were generated.
            state: passed to functions as `trainer_state`; by default one that holds only the step.

        Raises:
            UserError: a reward cannot be loaded, or rejects its configuration or the columns of the data.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} groups of completions")
        bounds = np.cumsum([0, *map(len, completions)])  # flat rows bounds[b]:bounds[b + 1] belong to prompt b
        # A chunk is closed as soon as it has `chunk_size` completions; the last may have fewer.
        cuts = [0]
        for last in range(1, len(prompts) + 1):
            if bounds[last] - bounds[cuts[-1]] >= self.options.chunk_size or last == len(prompts):
                cuts.append(last)
        chunks = list(pairwise(cuts))
        state = state or TrainerState(global_step=step)
        calls = []
        for reward, name in enumerate(self.names):
            for first, last in chunks:
                seed = derive_seed(name, source, step, prompts[first].id)
                calls.append(_call(prompts[first:last], completions[first:last], reward, state, seed))
        results = self._workers.run(calls)
        size = len(chunks)
        by_reward = [CallResult.joined(results[at * size : (at + 1) * size]) for at in range(len(self.rewards))]
        count = int(bounds[-1])
        scores = np.array([result.scores for result in by_reward], dtype=np.float32).reshape(len(by_reward), count)
        failed = np.zeros(scores.shape, dtype=bool)
        for reward, result in enumerate(by_reward):
            failed[reward, list(result.failures)] = True
        unscored = np.isnan(scores[self.correctness]) & ~failed[self.correctness]
        failed[self.correctness] |= unscored
        scores[failed] = 0.0
        kept: np.ndarray = (
            np.logical_not(failed.any(axis=0)) if self.on_failure == "drop" else np.ones(count, dtype=bool)
        )
        kinds: list[FailureKind] = [kind for result in by_reward for kind in result.failures.values()]
        logged = Ledger()
        for name, result in zip(self.names, by_reward, strict=True):
            for metric, value, weight in result.metrics:
                logged.average(f"{name}/{metric}", WeightedMean(value * weight, weight))
        total = np.nansum(scores * self.weights[:, None], axis=0).astype(np.float32)
        groups = []
        for prompt, sampled, start in zip(prompts, completions, bounds, strict=False):
            rows = start + np.flatnonzero(kept[start : start + len(sampled)])
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    completions=tuple(sampled[row - start] for row in rows),
                    rewards=total[rows],
                    correctness=scores[self.correctness, rows],
                    components={name: scores[reward, rows] for reward, name in enumerate(self.names)},
                    source=source,
                    birth_step=step,
                )
            )
        rows = np.flatnonzero(kept)
        return ScoreResult(
            groups=groups,
            timed_out=kinds.count("timed_out"),
            crashed=kinds.count("crashed"),
            unscored=int(unscored.sum()),
            dropped=int(count - kept.sum()),
            extras={
                name: [values[row] for row in rows] for result in by_reward for name, values in result.extras.items()
            },
            logged=logged.reward_metrics,
        )


def _call(
    prompts: Sequence[Prompt], sampled: Sequence[tuple[Completion, ...]], reward: int, state: TrainerState, seed: int
) -> Call:
    rows = [
        (prompt, item, completion)
        for prompt, completions in zip(prompts, sampled, strict=True)
        for item, completion in enumerate(completions)
    ]
    columns = {name: None for prompt in prompts for name in prompt.columns if name not in RESERVED}
    return Call(
        reward=reward,
        prompts=[prompt.prompt for prompt, _, _ in rows],
        completions=[
            completion.text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": completion.text}]
            for prompt, _, completion in rows
        ],
        completion_ids=[completion.token_ids for _, _, completion in rows],
        columns={name: [prompt.columns.get(name) for prompt, _, _ in rows] for name in columns},
        state=state,
        labels=[f"prompt {prompt.id!r}, completion {item}" for prompt, item, _ in rows],
        seed=seed,
    )


def _unique_names(rewards: Sequence[Reward]) -> list[str]:
    """Return the names under which rewards are logged: the second "format" is "format_2"."""
    names: list[str] = []
    for reward in rewards:
        name, number = reward.name, 1
        while name in names:
            number += 1
            name = f"{reward.name}_{number}"
        names.append(name)
    return names
