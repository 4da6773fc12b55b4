"""Scoring of completions by a list of rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from app.rewards.base import Reward
from app.rewards.formatting import Format
from app.rewards.incidents import Incidents
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import Call, CallResult, TrainerState
from datamodules.errors import UserError, nearest
from datamodules.ledger import Ledger, WeightedMean
from datamodules.seeding import derive_seed
from datamodules.types import REWARD_ARGUMENTS, Completion, Prompt, RolloutGroup, Source

logger = logging.getLogger("dots.rewards")

RESERVED = REWARD_ARGUMENTS | {"prompt", "completion"}
"""Arguments of reward functions, which a column of the data must not replace."""


MAX_WEIGHT = 1e6
"""Largest magnitude of a weight: the square of a weighted sum of scores must fit into float32, too."""


@dataclass(frozen=True, slots=True, eq=False)
class ScoreResult:
    """Scored groups, and what happened while they were scored.

    Attributes:
        groups: one per prompt, in order, without the completions that were left out (possibly all of them).
        timed_out: scores that took too long.
        crashed: scores lost to an exception, a dead worker, or a value that is not a number within bounds.
        failed: completions with a score that timed out or crashed.
        unscored: completions to which no correctness reward applies. They are always left out.
        dropped: completions left out.
        failed_by_reward: completions whose score by a reward failed, by the name of the reward.
        asked_by_reward: prompts that a reward was asked to score and their completions, by the name of the reward.
        logged: values given to `log_metric`, by `<reward name>/<metric>`, averaged over completions.
    """

    groups: list[RolloutGroup]
    timed_out: int
    crashed: int
    failed: int
    unscored: int
    dropped: int
    failed_by_reward: Mapping[str, int]
    asked_by_reward: Mapping[str, tuple[int, int]]
    logged: Mapping[str, WeightedMean]


class RewardScorer:
    """Scores completions by several rewards, in worker processes.

    The optimized reward is the weighted sum; a reward that returns None contributes nothing (as in TRL). A completion's
    correctness, which defines how difficult its prompt is, is the score of the first correctness reward (see `Reward`)
    that applies to it. A prompt whose source names its rewards is scored by these alone, as if the run had no others.

    Args:
        rewards: the rewards.
        on_failure: what happens in training to a completion whose score timed out or crashed: "drop" leaves it out of
            its group, "zero" scores it 0 in the reward that failed.
        workers: worker processes and their limits.

    Raises:
        UserError: no rewards, or a weight that is not a number within `MAX_WEIGHT`.
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
            if not abs(reward.weight) <= MAX_WEIGHT:
                raise UserError(
                    f"The weight of reward {reward.name!r} is {reward.weight}, expected a number of at most "
                    f"{MAX_WEIGHT:g} in magnitude. Change it."
                )
        self.rewards = list(rewards)
        self.names = _unique_names(self.rewards)
        self.weights = np.array([reward.weight for reward in rewards], dtype=np.float32)
        self.correctness = self._correctness_among(range(len(rewards)))
        """Positions of the correctness rewards."""
        self.on_failure = on_failure
        self.options = workers or WorkerOptions()
        self._workers = RewardWorkers(self.rewards, self.options)
        forms = zip(self.names, rewards, strict=True)
        patterns = {name: reward.pattern.pattern for name, reward in forms if isinstance(reward, Format)}
        self._incidents = Incidents(self.names, self.options, patterns)

    def _correctness_among(self, places: Sequence[int]) -> list[int]:
        marked = [place for place in places if self.rewards[place].correctness]
        unmarked = [place for place in places if self.rewards[place].correctness is None]
        return marked or unmarked or list(places[:1])

    def applying_to(self, prompt: Prompt, where: str = "the data") -> list[int]:
        """Return the positions of the rewards that score a prompt.

        Args:
            prompt: the prompt.
            where: the option that names its source, for messages.

        Raises:
            UserError: its source names a reward that the run does not have.
        """
        if prompt.rewards is None:
            return list(range(len(self.rewards)))
        for name in prompt.rewards:
            if name not in self.names:
                raise UserError(
                    f"{where} names the reward {name!r}, which model.rewards lacks: {nearest(name, self.names)}"
                )
        return [place for place, name in enumerate(self.names) if name in prompt.rewards]

    def start(self) -> None:
        """Start the workers without waiting, so that the first scores do not wait for their imports."""
        self._workers.start()

    def wait_ready(self) -> None:
        """Wait until the workers have loaded the rewards. Raises UserError when a reward cannot be loaded."""
        self._workers.run([])

    def close(self) -> None:
        """Stop the workers. May be called twice."""
        self._workers.close()

    def try_out(self, prompts: Sequence[Prompt]) -> None:
        """Score the reference answers of prompts, so that a reward that cannot work is refused before any rollout.

        Raises:
            UserError: the signature of a reward, the columns it reads, or what it returns is wrong. What it raises
                otherwise, and that it takes too long, is told in a line.
        """
        calls, tried = [], []
        for reward, name in enumerate(self.names):
            for prompt in prompts:
                if reward not in self.applying_to(prompt):
                    continue
                answers = (prompt.columns.get(column) for column in ("answer", "solution", "ground_truth"))
                text = str(next((answer for answer in answers if answer is not None), prompt.question))
                ids, logprobs = np.array(prompt.token_ids[-1:], np.int32), np.zeros(1, np.float32)
                one = Completion(ids, logprobs, "stop", 0, text)
                # Two, so that a reward which returns a single score is noticed.
                calls.append(replace(_call([prompt], [(one, one)], reward, TrainerState(), seed=0), trial=True))
                tried.append((name, f"prompt {prompt.id!r}, its reference answer {text[:80]!r}"))
        for (name, where), result in zip(tried, self._workers.run(calls), strict=True):
            if failure := result.failures.get(0):
                logger.warning(
                    "Reward %r fails on a trial completion of %s: %s. Training continues, and ends if the reward fails "
                    "on every completion of a step.", name, where, failure.error,
                )  # fmt: skip

    @property
    def incidents(self) -> Incidents:
        """What has gone wrong since the last report."""
        return self._incidents

    def score(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[tuple[Completion, ...]],
        *,
        source: Source,
        step: int,
        state: TrainerState | None = None,
        measured: bool = False,
    ) -> ScoreResult:
        """Score the completions of every prompt.

        Args:
            prompts: `B` prompts.
            completions: `B` tuples of completions.
            source: source of the groups.
            step: step in which the completions were generated.
            state: passed to functions as `trainer_state`; by default one that holds only the step.
            measured: the groups are measured and not trained on, so that a failed score counts as 0 and never as
                absent, whatever `on_failure` is.

        Raises:
            UserError: a reward cannot be loaded, or rejects its configuration or the columns of the data.
        """
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts and {len(completions)} groups of completions")
        bounds = np.cumsum([0, *map(len, completions)])  # flat rows bounds[b]:bounds[b + 1] belong to prompt b
        state = state or TrainerState(global_step=step)
        count, applying = int(bounds[-1]), [self.applying_to(prompt) for prompt in prompts]
        calls, asked = [], []
        for reward, name in enumerate(self.names):
            mine = [place for place, rewards in enumerate(applying) if reward in rewards]
            chunks = self._chunks([len(completions[place]) for place in mine])
            for first, last in chunks:
                its = mine[first:last]
                seed = derive_seed(name, source, step, prompts[its[0]].id)
                calls.append(
                    _call([prompts[one] for one in its], [completions[one] for one in its], reward, state, seed)
                )
            rows = np.concatenate([np.arange(bounds[one], bounds[one + 1]) for one in mine]) if mine else bounds[:0]
            asked.append((mine, rows, len(chunks)))
        results = iter(self._workers.run(calls))
        by_reward = [
            CallResult.joined([next(results) for _ in range(size)]).spread(rows, count) for _, rows, size in asked
        ]
        scores = np.array([result.scores for result in by_reward], dtype=np.float32).reshape(len(by_reward), count)
        failed = np.zeros(scores.shape, dtype=bool)
        for reward, result in enumerate(by_reward):
            failed[reward, list(result.failures)] = True
        scores[failed] = 0.0
        correctness = np.full(count, np.nan, dtype=np.float32)
        for place, rewards in enumerate(applying):
            rows = np.arange(bounds[place], bounds[place + 1])
            for reward in reversed(self._correctness_among(rewards)):
                applies = rows[~np.isnan(scores[reward, rows])]
                correctness[applies] = scores[reward, applies]
        unscored = np.isnan(correctness)
        any_failed = failed.any(axis=0)
        kept = ~unscored if measured or self.on_failure == "zero" else ~(unscored | any_failed)
        kinds = [failure.kind for result in by_reward for failure in result.failures.values()]
        texts = [completion.text for group in completions for completion in group]
        labels = _labels(prompts, completions)
        self._incidents.add(by_reward, labels, texts, unscored)
        extras: dict[str, list[Any]] = {}
        for result in by_reward:
            for column, values in result.extras.items():
                known = extras.get(column, values)
                extras[column] = [new if old is None else old for old, new in zip(known, values, strict=True)]
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
                    correctness=correctness[rows],
                    components={name: scores[reward, rows] for reward, name in enumerate(self.names)},
                    source=source,
                    birth_step=step,
                    extras={column: [values[row] for row in rows] for column, values in extras.items()},
                )
            )
        return ScoreResult(
            groups=groups,
            timed_out=kinds.count("timed_out"),
            crashed=kinds.count("crashed"),
            failed=int(any_failed.sum()),
            unscored=int(unscored.sum()),
            dropped=int(count - kept.sum()),
            failed_by_reward=dict(zip(self.names, failed.sum(axis=1).tolist(), strict=True)),
            asked_by_reward={
                name: (len(mine), len(rows)) for name, (mine, rows, _) in zip(self.names, asked, strict=True)
            },
            logged=logged.reward_metrics,
        )

    def _chunks(self, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Return half-open ranges of groups of these sizes, closed as soon as they have `chunk_size` completions."""
        cuts, open_size = [0], 0
        for last, size in enumerate(sizes, start=1):
            open_size += size
            if open_size >= self.options.chunk_size or last == len(sizes):
                cuts.append(last)
                open_size = 0
        return list(pairwise(cuts))


def _call(
    prompts: Sequence[Prompt], sampled: Sequence[tuple[Completion, ...]], reward: int, state: TrainerState, seed: int
) -> Call:
    rows = [
        (prompt, completion) for prompt, completions in zip(prompts, sampled, strict=True) for completion in completions
    ]
    columns = {name: None for prompt in prompts for name in prompt.columns if name not in RESERVED}
    return Call(
        reward=reward,
        prompts=[prompt.prompt for prompt, _ in rows],
        completions=[
            completion.text if isinstance(prompt.prompt, str) else [{"role": "assistant", "content": completion.text}]
            for prompt, completion in rows
        ],
        completion_ids=[completion.token_ids for _, completion in rows],
        columns={name: [prompt.columns.get(name) for prompt, _ in rows] for name in columns},
        state=state,
        labels=_labels(prompts, sampled),
        seed=seed,
    )


def _labels(prompts: Sequence[Prompt], completions: Sequence[tuple[Completion, ...]]) -> list[str]:
    return [
        f"prompt {prompt.id!r}, completion {item}"
        for prompt, own in zip(prompts, completions, strict=True)
        for item in range(len(own))
    ]


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
