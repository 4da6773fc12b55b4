"""The data that flows through a step.

Symbols used in all docstrings: `Q` prompts in the pool, `B` prompts in a batch, `G` completions per prompt, `K`
reference prompts, `N` sequences, `L` padded length, `T` completion tokens, `V` vocabulary size, `H` hidden size. A
reward lies in [0, 1] unless a user's function returns something else; the success rate `p` of a group is its mean
correctness reward, its difficulty `d = 1 - p`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from datamodules.ledger import Ledger

REWARD_TOLERANCE = 1e-6
"""Correctness rewards that differ by no more than this count as equal."""

REWARD_ARGUMENTS = frozenset(
    {"prompts", "completions", "completion_ids", "environments", "trainer_state", "log_extra", "log_metric"}
)
"""Arguments of reward functions: a column with one of these names cannot be passed to them."""

Messages = list[dict[str, Any]]
"""Turns of a conversation: `role` and `content`, both text; `tool_calls` and the like where the data have them."""

Source = Literal["fresh", "replay", "reference"]
FinishReason = Literal["stop", "length"]
Fate = Literal["trained", "surplus", "dropped"]
"""What becomes of a group: "trained" groups are trained on (or measured, in validation); "surplus" ones are on policy
but not trained on in this step, and a replay callback may keep them; "dropped" ones were rejected by a filter, and are
neither trained on nor kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """One prompt of a pool.

    Attributes:
        id: stable name, unique within the pool: the data set's own index, or else a hash of the text.
        index: position in the pool, `0 <= index < Q`.
        question: the raw question before any template, which encoders embed.
        prompt: what reward functions see: the rendered text, or the messages of a conversational data set.
        token_ids: the rendered prompt, as the policy reads it.
        columns: all other columns of the data (the answer among them), passed to the rewards by name.
        dataset: name of its training source or validation set; empty if it has none.
        rewards: names of the rewards that apply to it; None for all.
        extended: returns its tokens with text added to its last user message; None where the prompts of the run are
            not for an environment, or have no user message.
    """

    id: str
    index: int
    question: str
    prompt: str | Messages
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    dataset: str = ""
    rewards: tuple[str, ...] | None = None
    extended: Callable[[str], tuple[int, ...]] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A part of a conversation with an environment: what the policy generated at once, or what was said to it.

    Attributes:
        generated: True for the policy's own tokens, False for the environment's, which have no loss.
        tokens: number of the completion's tokens that it consists of; may be 0.
        messages: the same as messages: one of the assistant, or those of the environment.
    """

    generated: bool
    tokens: int
    messages: Messages


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """How a conversation with an environment ended.

    Attributes:
        reward: what the environment's own `get_reward` returned; None if it has none.
        environment: the final environment object, pickled, for reward functions that read it; None if it does not
            pickle. Only reward workers unpickle it.
        error: why the environment failed (it took too long, or its process died); empty if it did not.
        calls: tool calls that the policy made.
        failed_calls: those that raised, or named no tool.
    """

    reward: float | None = None
    environment: bytes | None = None
    error: str = ""
    calls: int = 0
    failed_calls: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One completion sampled from the behaviour policy `mu`, or a conversation of several turns of it.

    Attributes:
        token_ids: int32 `[T]`, without the prompt; includes the end token if there is one, and what an environment
            said between the policy's turns.
        logprobs: float32 `[T]`: log mu(token) under the distribution that was sampled from, that is, after
            temperature, top-k and top-p; NaN for an environment's tokens.
        finish_reason: "stop" (an end token or stop string) or "length" (truncated at the completion limit, or at the
            limit of turns).
        policy_version: number of optimizer updates that the weights of `mu` had seen.
        text: decoded, without special tokens.
        turns: the turns of a conversation, whose tokens add up to `T`; empty for a single turn of the policy.
        context: int32 `[P]`: tokens that the policy read before it in place of the prompt's, because the environment
            added to the prompt; None for the prompt's own.
        outcome: how the environment ended it; None without one. Not kept by a replay buffer or a checkpoint.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    policy_version: int
    text: str
    turns: tuple[Turn, ...] = ()
    context: np.ndarray | None = None
    outcome: Outcome | None = None

    @property
    def generated(self) -> np.ndarray:
        """The tokens that the policy generated, bool `[T]`; others are the environment's."""
        if not self.turns:
            return np.ones(len(self.token_ids), dtype=bool)
        return np.repeat([turn.generated for turn in self.turns], [turn.tokens for turn in self.turns])

    @property
    def generated_tokens(self) -> int:
        """Number of tokens that the policy generated."""
        return sum(turn.tokens for turn in self.turns if turn.generated) if self.turns else len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """The scored completions of one prompt, relative to which its advantages are computed.

    Attributes:
        completions: `G` completions, or fewer if some were left out because their score failed or is missing.
        rewards: float32 `[G]`: weighted sum of the rewards that apply, which is optimized.
        correctness: float32 `[G]`: score of the first correctness reward that applies, which difficulty and filters
            refer to.
        components: float32 `[G]` by reward name; NaN where the reward does not apply.
        source: "fresh", "reference" (rolled out to measure difficulty), or "replay".
        birth_step: step in which it was generated.
        extras: `G` values by column that reward functions logged for the table of completions; not kept by a replay
            buffer or a checkpoint.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    rewards: np.ndarray
    correctness: np.ndarray
    components: Mapping[str, np.ndarray]
    source: Source
    birth_step: int
    extras: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def success_rate(self) -> float:
        """Mean correctness reward `p`, or NaN for a group without completions."""
        return float(np.mean(self.correctness)) if len(self.correctness) else float("nan")

    @property
    def informative(self) -> bool:
        """Whether the correctness rewards differ within the group, so that it has a learning signal."""
        return len(self.correctness) > 1 and float(np.ptp(self.correctness)) > REWARD_TOLERANCE

    @property
    def completion_tokens(self) -> int:
        """Number of tokens of the group that the policy generated."""
        return sum(completion.generated_tokens for completion in self.completions)

    def joined(self, later: RolloutGroup) -> RolloutGroup:
        """Return this group with the completions of another one of the same prompt, rewards and step after its own."""
        sizes = len(self.completions), len(later.completions)
        return replace(
            self,
            completions=self.completions + later.completions,
            rewards=np.concatenate([self.rewards, later.rewards]),
            correctness=np.concatenate([self.correctness, later.correctness]),
            components={
                name: np.concatenate([values, later.components[name]]) for name, values in self.components.items()
            },
            extras={
                column: [
                    value
                    for group, size in zip((self, later), sizes, strict=True)
                    for value in group.extras.get(column, [None] * size)
                ]
                for column in {**self.extras, **later.extras}
            },
        )


@dataclass(frozen=True, slots=True, eq=False)
class GroupSketch:
    """A sketch of the gradient of a group's objective with respect to the output head, as its update has applied it.

    Inner products of sketches of one run estimate those of the gradients (`app.objective.sketches`). The gradient is
    the group's share in the mean over its mini-batch: advantages, token weights, importance weights, clipping, KL and
    entropy terms are those of the loss.

    Attributes:
        group: position of the group in `TrainBatch.groups`.
        prompt_id: id of its prompt.
        source: "fresh", "reference" or "replay".
        birth_step: step in which it was generated.
        vector: float32 `[1024]`, the direction of ascent; 0 for a group without a gradient.
    """

    group: int
    prompt_id: str
    source: Source
    birth_step: int
    vector: np.ndarray

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], vectors: np.ndarray) -> list[GroupSketch]:
        """Return the sketches of a batch's groups, in order, with their vectors, float32 `[len(groups), 1024]`."""
        return [
            cls(index, group.prompt.id, group.source, group.birth_step, vector)
            for index, (group, vector) in enumerate(zip(groups, vectors, strict=True))
        ]


class TrainBatch:
    """The data of one step. The loader sets `prompts`, callbacks add groups, and the module trains on `groups`.

    Not a dataclass: Lightning copies dataclasses when it moves them to the device, and all callbacks must share one
    batch.

    Attributes:
        step: number of steps begun before this one; validation batches hold their position instead.
        prompts: prompts to roll out: `B`, or fewer if replayed groups will complete the batch, followed by those that
            were chosen to replace dropped groups.
        rollouts: all groups of the step with what becomes of each, in a fixed order.
        forecast: float64 `[len(prompts)]`: success rate that the selector expected of each prompt before its rollouts;
            None without a forecast, NaN for prompts chosen before there was one.
        pool_forecast: float64 `[Q]`: success rate expected of every prompt of the pool before the first rollout of the
            step, or None.
        explored: ids of the prompts that the selector chose by uniform exploration.
        reference_forecast: float64 `[K, 2]`: expected and measured success rate of the reference prompts rolled out
            since the previous step; None without reference prompts or without a forecast.
        advantages: float32 `[G]` per group, set by the training step.
        wants_sketches: whether the training step makes `sketches`; set it before, at the latest when the batch starts.
        sketches: one per group of `groups`, in order, the same on all ranks; set by the training step if wanted.
        drift: float32 `[len(groups)]`: mean `|log pi_old - log mu|` over the tokens that each group was trained on, how
            far the policy is from the one that generated it; NaN without such tokens. Set by the training step of a
            batch with replayed groups.
        metrics: scalars to log with this step, by full name.
        ledger: seconds, counts and reward metrics of this step.
    """

    __slots__ = (
        "advantages",
        "drift",
        "explored",
        "forecast",
        "ledger",
        "metrics",
        "pool_forecast",
        "prompts",
        "reference_forecast",
        "rollouts",
        "sketches",
        "step",
        "wants_sketches",
    )

    def __init__(self, step: int, prompts: Sequence[Prompt], forecast: np.ndarray | None = None) -> None:
        self.step = step
        self.prompts = tuple(prompts)
        self.rollouts: list[tuple[RolloutGroup, Fate]] = []
        self.forecast = forecast
        self.explored: frozenset[str] = frozenset()
        self.pool_forecast: np.ndarray | None = None
        self.reference_forecast: np.ndarray | None = None
        self.advantages: list[np.ndarray] = []
        self.drift: np.ndarray | None = None
        self.wants_sketches = False
        self.sketches: list[GroupSketch] = []
        self.metrics: dict[str, float] = {}
        self.ledger = Ledger()

    @property
    def groups(self) -> list[RolloutGroup]:
        """The groups to train on (or to measure), in order; a new list."""
        return self.of("trained")

    def of(self, *fates: Fate) -> list[RolloutGroup]:
        """Return the groups of these fates, one fate after the other, each in order; a new list."""
        return [group for fate in fates for group, its in self.rollouts if its == fate]

    def add(self, groups: Iterable[RolloutGroup], fate: Fate = "trained") -> None:
        """Append groups."""
        self.rollouts += [(group, fate) for group in groups]

    def move(self, groups: Iterable[RolloutGroup], fate: Fate) -> None:
        """Give groups of the batch another fate, and put them at the end in the given order."""
        moved = list(groups)
        ids = {id(group) for group in moved}
        self.rollouts = [entry for entry in self.rollouts if id(entry[0]) not in ids]
        self.add(moved, fate)

    def forecast_of(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Return the expected success rate of some prompts of the batch, float64 `[N]`; NaN without a forecast."""
        asked = () if self.forecast is None else zip(self.prompts, self.forecast.tolist(), strict=True)
        expected = {prompt.id: one for prompt, one in asked}
        return np.array([expected.get(prompt.id, np.nan) for prompt in prompts], dtype=np.float64)

    def add_prompts(self, prompts: Sequence[Prompt], forecast: np.ndarray | None) -> None:
        """Append prompts and their expected success rates (float64 `[len(prompts)]`, or None without a forecast)."""
        if self.forecast is not None or forecast is not None:
            parts = ((self.prompts, self.forecast), (prompts, forecast))
            self.forecast = np.concatenate(
                [np.full(len(asked), np.nan) if expected is None else expected for asked, expected in parts]
            )
        self.prompts = (*self.prompts, *prompts)


@dataclass(frozen=True, slots=True, eq=False)
class Outcomes:
    """Measured success rates of prompts, as selectors see them.

    Attributes:
        step: step whose policy generated the rollouts.
        prompt_ids: `N` ids.
        success_rate: float64 `[N]`.
        samples: int64 `[N]`: number of completions that each rate is the mean of.
        source: "fresh" for selected prompts, "reference" for a uniform draw from the pool.
        reward_std: float64 `[N]`: standard deviation of the correctness rewards within each group.
        group_size: completions of a whole group (on average, where they were given to prompts by their forecasts); None
            where that is the largest of `samples`.
    """

    step: int
    prompt_ids: Sequence[str]
    success_rate: np.ndarray
    samples: np.ndarray
    source: Source
    reward_std: np.ndarray
    group_size: int | None = None

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup], step: int, source: Source, group_size: int | None = None) -> Outcomes:
        """Return the outcomes of groups, without those that lost all their completions."""
        kept = [group for group in groups if len(group.completions)]
        return cls(
            step=step,
            prompt_ids=[group.prompt.id for group in kept],
            success_rate=np.array([group.success_rate for group in kept], dtype=np.float64),
            samples=np.array([len(group.completions) for group in kept], dtype=np.int64),
            source=source,
            reward_std=np.array([float(np.std(group.correctness)) for group in kept], dtype=np.float64),
            group_size=group_size,
        )
