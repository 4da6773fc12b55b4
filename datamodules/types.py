"""The data that flows through a step.

Letters used in every docstring of the project: `Q` prompts in the pool, `B` prompts in a batch, `G` completions per
prompt, `K` reference prompts, `N` sequences, `L` padded length, `T` completion tokens, `V` vocabulary, `H` hidden size.
A reward lies in [0, 1] unless a user's function says otherwise; success rate `p` is a group's mean correctness reward,
difficulty `d = 1 - p`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from datamodules.ledger import Ledger

REWARD_TOLERANCE = 1e-6
"""Two correctness rewards closer than this are equal."""

Messages = list[dict[str, str]]
Source = Literal["fresh", "replay", "reference"]
FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt of a pool.

    Attributes:
        id: stable name: the data's own index, else a hash of the text. Unique within the pool.
        index: position in the pool, `0 <= index < Q`.
        question: the raw question, before any template. This is what an encoder embeds.
        prompt: what a reward function sees: the rendered text, or the messages of a conversational data set.
        token_ids: the rendered prompt, as the policy reads it.
        columns: every other column of the data (the answer among them), handed to the rewards by name.
    """

    id: str
    index: int
    question: str
    prompt: str | Messages
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled completion, as the behaviour policy `mu` produced it.

    Attributes:
        token_ids: int32 `[T]`, with the end token when there is one, without the prompt.
        logprobs: float32 `[T]`: log mu(token) under the distribution really sampled from, that is after temperature,
            top-k and top-p.
        finish_reason: "stop" (an end token or stop string) or "length" (cut at the completion limit).
        policy_version: optimizer updates that the weights of `mu` had seen.
        text: decoded, without special tokens.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    policy_version: int
    text: str


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """The scored completions of one prompt; advantages are relative to this group.

    Attributes:
        completions: `G` of them, fewer when a completion whose score failed was left out.
        rewards: float32 `[G]`: weighted sum of all rewards; what is optimised.
        correctness: float32 `[G]`: the one reward marked as correctness; what difficulty and filters are about.
        components: float32 `[G]` by reward name (NaN where a function returned None).
        source: "fresh", "reference" (rolled out to measure difficulty), or "replay".
        birth_step: step at which it was generated.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: np.ndarray
    correctness: np.ndarray
    components: Mapping[str, np.ndarray]
    source: Source
    birth_step: int

    @property
    def success_rate(self) -> float:
        """Mean correctness reward `p`; NaN for a group without completions."""
        return float(np.mean(self.correctness)) if len(self.correctness) else float("nan")

    @property
    def informative(self) -> bool:
        """Whether the correctness rewards differ within the group, that is whether it teaches."""
        return len(self.correctness) > 1 and float(np.ptp(self.correctness)) > REWARD_TOLERANCE

    @property
    def completion_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


class TrainBatch:
    """What a step works on. The loader fills `prompts`; callbacks append to `groups`; the module reads `groups`.

    Not a dataclass: Lightning copies those on their way to the device, and callbacks must share one batch.

    Attributes:
        step: steps begun before this one; validation batches carry the batch's position instead.
        prompts: to be rolled out: `B` of them, fewer when replayed groups will complete the batch; prompts chosen to
            replace dropped groups follow behind.
        groups: what is trained on (or measured), in a fixed order.
        forecast: float64 `[len(prompts)]`: success rate that the selector expected of each prompt before its rollouts;
            None where it makes no forecast, NaN for prompts chosen before it could make one.
        pool_forecast: float64 `[Q]`: what it expected of every prompt of the pool before the step's first rollout, or
            None.
        explored: ids of the prompts that the selector chose by uniform exploration.
        reference_forecast: float64 `[K, 2]`: success rate expected and then measured of the reference prompts rolled
            out since the step before; None where there were none, or no forecast.
        surplus: on-policy groups that were generated but will not be trained on in this step; a replay callback may
            keep them.
        dropped: on-policy groups that a filter refused: neither trained on nor kept.
        advantages: float32 `[G]` per group, filled by the training step.
        metrics: scalars to be logged with this step, by their full name.
        ledger: seconds and counts of this step.
    """

    __slots__ = (
        "advantages",
        "dropped",
        "explored",
        "forecast",
        "groups",
        "ledger",
        "metrics",
        "pool_forecast",
        "prompts",
        "reference_forecast",
        "step",
        "surplus",
    )

    def __init__(self, step: int, prompts: Sequence[Prompt], forecast: np.ndarray | None = None) -> None:
        self.step = step
        self.prompts = tuple(prompts)
        self.groups: list[RolloutGroup] = []
        self.surplus: list[RolloutGroup] = []
        self.dropped: list[RolloutGroup] = []
        self.forecast = forecast
        self.explored: frozenset[str] = frozenset()
        self.pool_forecast: np.ndarray | None = None
        self.reference_forecast: np.ndarray | None = None
        self.advantages: list[np.ndarray] = []
        self.metrics: dict[str, float] = {}
        self.ledger = Ledger()

    def add_prompts(self, prompts: Sequence[Prompt], forecast: np.ndarray | None) -> None:
        """Appends prompts and what is expected of them (float64 `[len(prompts)]`, None for no forecast)."""
        if self.forecast is not None or forecast is not None:
            parts = ((self.prompts, self.forecast), (prompts, forecast))
            self.forecast = np.concatenate(
                [np.full(len(asked), np.nan) if expected is None else expected for asked, expected in parts]
            )
        self.prompts = (*self.prompts, *prompts)


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Measured success of rolled-out prompts, as a selector sees it.

    Attributes:
        step: step whose policy generated them.
        prompt_ids: `N` ids.
        success_rate: float64 `[N]`.
        samples: int64 `[N]`: completions behind each rate.
        source: "fresh" for selected prompts, "reference" for a uniform draw from the pool.
        reward_std: float64 `[N]`: standard deviation of the correctness rewards within each group.
    """

    step: int
    prompt_ids: Sequence[str]
    success_rate: np.ndarray
    samples: np.ndarray
    source: Source
    reward_std: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], step: int, source: Source) -> Outcomes:
        """From groups; a group that lost all its completions is left out."""
        kept = [group for group in groups if len(group.completions)]
        return cls(
            step=step,
            prompt_ids=[group.prompt.id for group in kept],
            success_rate=np.array([group.success_rate for group in kept], dtype=np.float64),
            samples=np.array([len(group.completions) for group in kept], dtype=np.int64),
            source=source,
            reward_std=np.array([float(np.std(group.correctness)) for group in kept], dtype=np.float64),
        )
