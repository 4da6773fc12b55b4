"""From completions to scored groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from app.rewards.base import Reward
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import Call, CallResult, FailureKind, TrainerState
from datamodules.errors import UserError
from datamodules.seeding import derive_seed
from datamodules.types import Completion, Prompt, RolloutGroup, Source

RESERVED = frozenset(
    {"prompt", "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)
"""Arguments of a reward function, which a column of the data must not replace."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    """What scoring a batch gave.

    Attributes:
        groups: one per prompt, in order; without the completions that were left out (all of them, at worst).
        timed_out: scores that took too long.
        crashed: scores lost to an exception, a dead worker, or a value that is no finite number.
        unscored: correctness scores that are None, which count as failures: difficulty is not defined without.
        dropped: completions left out.
        extras: by column as logged with `log_extra`: one value per remaining completion, in the order of `groups`;
            None where none was logged.
        logged: values logged with `log_metric`, by name.
    """

    groups: list[RolloutGroup]
    timed_out: int
    crashed: int
    unscored: int
    dropped: int
    extras: Mapping[str, list[Any]]
    logged: Mapping[str, list[float]]

    @property
    def metrics(self) -> dict[str, float]:
        """Mean of what was logged, by name."""
        return means(self.logged)


@dataclass(frozen=True)
class _Batch:
    """Completions of all prompts, flat: `N` rows, of which `bounds[b]:bounds[b + 1]` belong to prompt `b`."""

    prompts: Sequence[Prompt]
    completions: Sequence[tuple[Completion, ...]]
    bounds: np.ndarray

    @classmethod
    def of(cls, prompts: Sequence[Prompt], completions: Sequence[tuple[Completion, ...]]) -> _Batch:
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} groups of completions")
        return cls(prompts, completions, np.cumsum([0, *map(len, completions)]))

    def chunks(self, size: int) -> Iterator[tuple[int, int]]:
        """Ranges of prompts with at least `size` completions, the last perhaps fewer."""
        first = 0
        for last in range(1, len(self.prompts) + 1):
            if self.bounds[last] - self.bounds[first] >= size or last == len(self.prompts):
                yield first, last
                first = last


class RewardScorer:
    """Scores completions with several rewards, in worker processes.

    The optimised reward is the weighted sum; a reward that returns None contributes nothing (as in TRL).

    Args:
        rewards: rewards; exactly one says how difficult a prompt is: the one marked `correctness`, else the first.
        on_failure: what becomes of a completion whose score timed out or crashed: "drop" leaves it out of its group,
            "zero" scores it 0 in the reward that failed.
        workers: the worker processes and their limits.

    Raises:
        UserError: no rewards, several marked as correctness, or a weight that is no finite number.
    """

    def __init__(
        self,
        rewards: list[Reward],
        on_failure: Literal["drop", "zero"] = "drop",
        workers: WorkerOptions | None = None,
    ) -> None:
        if on_failure not in ("drop", "zero"):
            raise UserError(f"on_failure={on_failure!r}: expected 'drop' or 'zero'")
        self.rewards = list(rewards)
        self.names = _unique_names(self.rewards)
        self.weights = _weights(self.rewards)
        self.correctness = _correctness(self.rewards)
        self.on_failure = on_failure
        self.options = workers or WorkerOptions()
        self._workers = RewardWorkers(self.rewards, self.options)

    @property
    def correctness_name(self) -> str:
        return self.names[self.correctness]

    def start(self) -> None:
        """Starts the workers without waiting, so that the first scores need not wait for their imports."""
        self._workers.start()

    def wait_ready(self) -> None:
        """Waits until the workers have loaded the rewards.

        Raises:
            UserError: a reward cannot be loaded.
        """
        self._workers.wait_ready()

    def close(self) -> None:
        """Ends the workers. May be called twice."""
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
        """Scores the completions of every prompt.

        Args:
            prompts: `B` prompts.
            completions: `B` tuples of completions.
            source: of the groups.
            step: at which the completions were generated.
            state: passed to functions as `trainer_state`; by default one that knows only the step.

        Raises:
            UserError: a reward cannot be loaded, or finds its configuration or the data's columns wrong.
        """
        batch = _Batch.of(prompts, completions)
        chunks = list(batch.chunks(self.options.chunk_size))
        state = state or TrainerState(global_step=step)
        requests = [
            _call(batch, reward, first, last, state, derive_seed(self.names[reward], source, step, prompts[first].id))
            for reward in range(len(self.rewards))
            for first, last in chunks
        ]
        results = self._workers.run(requests)
        by_reward = [
            CallResult.joined(results[reward * len(chunks) : (reward + 1) * len(chunks)])
            for reward in range(len(self.rewards))
        ]
        return self._assemble(batch, by_reward, source, step)

    def _assemble(self, batch: _Batch, results: Sequence[CallResult], source: Source, step: int) -> ScoreResult:
        count = int(batch.bounds[-1])
        scores = np.array([result.scores for result in results], dtype=np.float32).reshape(len(results), count)
        failed = np.zeros(scores.shape, dtype=bool)
        for reward, result in enumerate(results):
            failed[reward, list(result.failures)] = True
        unscored = np.isnan(scores[self.correctness]) & ~failed[self.correctness]
        failed[self.correctness] |= unscored
        scores[failed] = 0.0
        kept: np.ndarray = (
            np.logical_not(failed.any(axis=0)) if self.on_failure == "drop" else np.ones(count, dtype=bool)
        )
        kinds: list[FailureKind] = [kind for result in results for kind in result.failures.values()]
        return ScoreResult(
            groups=self._groups(batch, scores, kept, source, step),
            timed_out=kinds.count("timed_out"),
            crashed=kinds.count("crashed"),
            unscored=int(unscored.sum()),
            dropped=int(count - kept.sum()),
            extras=_extras(results, kept),
            logged=_logged(results),
        )

    def _groups(
        self, batch: _Batch, scores: np.ndarray, kept: np.ndarray, source: Source, step: int
    ) -> list[RolloutGroup]:
        total = np.nansum(scores * self.weights[:, None], axis=0).astype(np.float32)
        groups = []
        for row, (prompt, completions) in enumerate(zip(batch.prompts, batch.completions, strict=True)):
            start = int(batch.bounds[row])
            rows = start + np.flatnonzero(kept[start : batch.bounds[row + 1]])
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    completions=tuple(completions[item - start] for item in rows),
                    rewards=total[rows],
                    correctness=scores[self.correctness, rows],
                    components={name: scores[reward, rows] for reward, name in enumerate(self.names)},
                    source=source,
                    birth_step=step,
                )
            )
        return groups


def _call(batch: _Batch, reward: int, first: int, last: int, state: TrainerState, seed: int) -> Call:
    """The call of one reward for all completions of prompts `first` to `last - 1`."""
    rows = [
        (prompt, item, completion)
        for prompt, group in zip(batch.prompts[first:last], batch.completions[first:last], strict=True)
        for item, completion in enumerate(group)
    ]
    names = {name: None for prompt in batch.prompts[first:last] for name in prompt.columns if name not in RESERVED}
    return Call(
        reward=reward,
        prompts=[prompt.prompt for prompt, _, _ in rows],
        completions=[
            completion.text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": completion.text}]
            for prompt, _, completion in rows
        ],
        completion_ids=[completion.token_ids for _, _, completion in rows],
        columns={name: [prompt.columns.get(name) for prompt, _, _ in rows] for name in names},
        state=state,
        labels=[f"prompt {prompt.id!r}, completion {item}" for prompt, item, _ in rows],
        seed=seed,
    )


def _extras(results: Sequence[CallResult], kept: np.ndarray) -> dict[str, list[Any]]:
    rows = np.flatnonzero(kept)
    return {name: [values[row] for row in rows] for result in results for name, values in result.extras.items()}


def means(logged: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Mean of logged values by name; their order does not matter."""
    return {name: math.fsum(values) / len(values) for name, values in logged.items()}


def _logged(results: Sequence[CallResult]) -> dict[str, list[float]]:
    logged: dict[str, list[float]] = {}
    for result in results:
        for name, value in result.metrics:
            logged.setdefault(name, []).append(value)
    return logged


def _unique_names(rewards: Sequence[Reward]) -> list[str]:
    """Names by which rewards are logged: the second "format" is "format_2"."""
    names: list[str] = []
    for reward in rewards:
        name, number = reward.name, 1
        while name in names:
            number += 1
            name = f"{reward.name}_{number}"
        names.append(name)
    return names


def _weights(rewards: Sequence[Reward]) -> np.ndarray:
    if not rewards:
        raise UserError("rewards=[]: expected at least one reward, e.g. class_path: app.rewards.Math")
    for reward in rewards:
        if not math.isfinite(reward.weight):
            raise UserError(f"weight={reward.weight} of reward {reward.name!r}: expected a finite number")
    return np.array([reward.weight for reward in rewards], dtype=np.float32)


def _correctness(rewards: Sequence[Reward]) -> int:
    marked = [position for position, reward in enumerate(rewards) if reward.correctness]
    if len(marked) > 1:
        names = ", ".join(repr(rewards[position].name) for position in marked)
        raise UserError(f"correctness: true on {len(marked)} rewards ({names}): expected one; unmark the others")
    return marked[0] if marked else 0
