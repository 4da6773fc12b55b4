"""Scoring of completions by a list of rewards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from app.rewards.answers import text_of
from app.rewards.base import Reward
from app.rewards.environment import Environment
from app.rewards.formatting import Format
from app.rewards.incidents import Incidents
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import Call, CallResult, Loggable, TrainerState
from datamodules.errors import UserError, nearest
from datamodules.ledger import Ledger, WeightedMean
from datamodules.seeding import derive_seed
from datamodules.types import REWARD_ARGUMENTS, Completion, Messages, Prompt, RolloutGroup, Source

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
        failed: completions with a score that timed out or crashed, or whose environment failed.
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
            its group, "zero" scores it 0 in the reward that failed. One whose environment failed is not scored: it is
            left out, or 0 in all rewards.
        workers: worker processes and their limits.
        environment: the completions are conversations with an environment.

    Raises:
        UserError: no rewards, a weight that is not a number within `MAX_WEIGHT`, a reward that may take longer than a
            worker, or one that is the environment's without an environment.
    """

    def __init__(
        self,
        rewards: list[Reward],
        on_failure: Literal["drop", "zero"] = "drop",
        workers: WorkerOptions | None = None,
        environment: bool = False,
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
        self.options, self.environment = workers or WorkerOptions(), environment
        for reward in rewards:
            if isinstance(reward, Environment) and not environment:
                raise UserError(
                    f"Reward {reward.name!r} is what the run's environment gives, but the run has none. Set "
                    "model.environment, or choose another reward."
                )
            if reward.seconds_per_score > self.options.time_limit_s:
                raise UserError(
                    f"Reward {reward.name!r} may need {reward.seconds_per_score:g} s for a score, more than "
                    f"model.reward_workers.time_limit_s={self.options.time_limit_s:g} s. Raise that, or lower "
                    "time_limit_s of the reward."
                )
        self.rewards = list(rewards)
        self.names = _unique_names(self.rewards)
        self.weights = np.array([reward.weight for reward in rewards], dtype=np.float32)
        self.correctness = self._correctness_among(range(len(rewards)))
        """Positions of the correctness rewards."""
        self.on_failure = on_failure
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
                if reward not in self.applying_to(prompt) or isinstance(self.rewards[reward], Environment):
                    continue
                answers = (prompt.columns.get(column) for column in ("answer", "solution", "ground_truth"))
                text = str(next((answer for answer in answers if answer is not None), prompt.question))
                ids, logprobs = np.array(prompt.token_ids[-1:], np.int32), np.zeros(1, np.float32)
                one = Completion(ids, logprobs, "stop", 0, text)
                # Two, so that a reward which returns a single score is noticed.
                call = self._call([prompt], [(one, one)], reward, TrainerState(), seed=0)
                calls.append(replace(call, environments=[None, None] if self.environment else None, trial=True))
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
        rows = [np.arange(first, last) for first, last in pairwise(bounds)]
        errors = [one.outcome.error if one.outcome else "" for group in completions for one in group]
        broken = np.array(list(map(bool, errors)), dtype=bool)
        scored_rows = [own[~broken[own]] for own in rows]
        count, applying = int(bounds[-1]), [self.applying_to(prompt) for prompt in prompts]
        state = state or TrainerState(global_step=step)
        scored_by = [
            [place for place, rewards in enumerate(applying) if reward in rewards] for reward in range(len(self.names))
        ]
        calls = [
            [
                self._call([prompts[one] for one in its], [completions[one] for one in its], reward, state,
                           derive_seed(self.names[reward], source, step, prompts[its[0]].id))
                for its in self._chunks(places, list(map(len, completions)))
            ]
            for reward, places in enumerate(scored_by)
        ]  # fmt: skip
        results = iter(self._workers.run([call for its in calls for call in its]))
        by_reward = [
            CallResult.joined([next(results) for _ in its]).spread(_rows_of(places, scored_rows), count)
            for its, places in zip(calls, scored_by, strict=True)
        ]
        scores = np.array([result.scores for result in by_reward], dtype=np.float32).reshape(len(by_reward), count)
        failed = np.zeros(scores.shape, dtype=bool)
        for reward, result in enumerate(by_reward):
            failed[reward, list(result.failures)] = True
        scores[failed] = 0.0
        for reward, places in enumerate(scored_by):
            scores[reward, [row for row in _rows_of(places, rows) if broken[row]]] = 0.0
        correctness = self._correctness(scores, rows, applying)
        unscored, any_failed = np.isnan(correctness), failed.any(axis=0) | broken
        kept = ~unscored if measured or self.on_failure == "zero" else ~(unscored | any_failed)
        texts = [completion.text for group in completions for completion in group]
        self._incidents.add(by_reward, _labels(prompts, completions), texts, unscored, errors)
        total = np.nansum(scores * self.weights[:, None], axis=0).astype(np.float32)
        extras = _extras(by_reward)
        groups = []
        for prompt, sampled, own in zip(prompts, completions, rows, strict=True):
            left = own[kept[own]]
            groups.append(
                RolloutGroup(
                    prompt=prompt,
                    completions=tuple(sampled[row - own[0]] for row in left),
                    rewards=total[left],
                    correctness=correctness[left],
                    components={name: scores[reward, left] for reward, name in enumerate(self.names)},
                    source=source,
                    birth_step=step,
                    extras={column: [values[row] for row in left] for column, values in extras.items()},
                )
            )
        kinds = [failure.kind for result in by_reward for failure in result.failures.values()]
        return ScoreResult(
            groups=groups,
            timed_out=kinds.count("timed_out"),
            crashed=kinds.count("crashed"),
            failed=int(any_failed.sum()),
            unscored=int(unscored.sum()),
            dropped=int(count - kept.sum()),
            failed_by_reward=dict(zip(self.names, failed.sum(axis=1).tolist(), strict=True)),
            asked_by_reward={
                name: (len(places), len(_rows_of(places, scored_rows)))
                for name, places in zip(self.names, scored_by, strict=True)
            },
            logged=_logged(self.names, by_reward),
        )

    def _call(
        self,
        prompts: Sequence[Prompt],
        sampled: Sequence[tuple[Completion, ...]],
        reward: int,
        state: TrainerState,
        seed: int,
    ) -> Call:
        """Return the call that scores the completions of prompts, without those whose environment failed."""
        labels = iter(_labels(prompts, sampled))
        rows = [
            (prompt, completion, label)
            for prompt, completions in zip(prompts, sampled, strict=True)
            for completion, label in zip(completions, labels, strict=False)
            if not (completion.outcome and completion.outcome.error)
        ]
        columns = {name: None for prompt in prompts for name in prompt.columns if name not in RESERVED}
        of_rows = {name: [prompt.columns.get(name) for prompt, _, _ in rows] for name in columns}
        outcomes = [completion.outcome for _, completion, _ in rows]
        if isinstance(self.rewards[reward], Environment):
            of_rows["environment_rewards"] = [None if one is None else one.reward for one in outcomes]
        reads = self.environment and self.rewards[reward].takes_environments
        return Call(
            reward=reward,
            prompts=[prompt.prompt for prompt, _, _ in rows],
            completions=[_said(completion, isinstance(prompt.prompt, str)) for prompt, completion, _ in rows],
            completion_ids=[completion.token_ids for _, completion, _ in rows],
            columns=of_rows,
            state=state,
            labels=[label for _, _, label in rows],
            seed=seed,
            environments=[None if one is None else one.environment for one in outcomes] if reads else None,
        )

    def _correctness(
        self, scores: np.ndarray, rows: Sequence[np.ndarray], applying: Sequence[Sequence[int]]
    ) -> np.ndarray:
        """Return the correctness `[N]` of scores `[R, N]`, NaN where no correctness reward applies.

        Args:
            scores: of `R` rewards, NaN where one does not apply.
            rows: the completions of each prompt.
            applying: the rewards of each prompt.
        """
        found = np.full(scores.shape[1], np.nan, dtype=np.float32)
        for own, rewards in zip(rows, applying, strict=True):
            for reward in reversed(self._correctness_among(rewards)):
                applies = own[~np.isnan(scores[reward, own])]
                found[applies] = scores[reward, applies]
        return found

    def _chunks(self, places: Sequence[int], sizes: Sequence[int]) -> list[Sequence[int]]:
        """Cut places of groups of these sizes into runs that end as soon as they have `chunk_size` completions."""
        cuts, open_size = [0], 0
        for last, place in enumerate(places, start=1):
            open_size += sizes[place]
            if open_size >= self.options.chunk_size or last == len(places):
                cuts.append(last)
                open_size = 0
        return [places[first:last] for first, last in pairwise(cuts)]


def _rows_of(places: Sequence[int], rows: Sequence[np.ndarray]) -> np.ndarray:
    """Return the completions of these prompts."""
    return np.concatenate([np.empty(0, int), *(rows[place] for place in places)])


def _extras(results: Sequence[CallResult]) -> dict[str, list[Loggable]]:
    """Return what `log_extra` was given by column: the first value that any reward has given a completion."""
    extras: dict[str, list[Loggable]] = {}
    for result in results:
        for column, values in result.extras.items():
            known = extras.get(column, values)
            extras[column] = [new if old is None else old for old, new in zip(known, values, strict=True)]
    return extras


def _logged(names: Sequence[str], results: Sequence[CallResult]) -> dict[str, WeightedMean]:
    """Return what `log_metric` was given, by `<reward name>/<metric>`."""
    logged = Ledger()
    for name, result in zip(names, results, strict=True):
        for metric, value, weight in result.metrics:
            logged.average(f"{name}/{metric}", WeightedMean(value * weight, weight))
    return logged.reward_metrics


def _said(completion: Completion, as_text: bool) -> str | Messages:
    """Return a completion as rewards see it: of a conversation, all its messages, or the text of its last own turn."""
    if not completion.turns:
        return completion.text if as_text else [{"role": "assistant", "content": completion.text}]
    messages = [message for turn in completion.turns for message in turn.messages]
    return text_of(messages) if as_text else messages


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
