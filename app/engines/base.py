"""The interface of rollout engines, and what all of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.engines.ahead import Ahead, Groups
from app.engines.turns import Conversations
from app.ranks import Ranks
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Returns the policy's current tensors by name."""

Completed = Callable[[Mapping[int, tuple[Completion, ...]]], list[int]]
"""Given pilots by the positions of their prompts, returns the positions of the groups that are to be completed."""


class Generate(Protocol):
    """Generates completions; see `RolloutEngine.generate`."""

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, /) -> Groups: ...


def check_options(where: str, *checks: tuple[str, float | None, bool, str]) -> None:
    """Raise UserError for the first option whose (name, given value, is valid, expected) is not valid."""
    for name, given, valid, expected in checks:
        if not valid:
            raise UserError(f"{where}.{name} is {given} but must be {expected}. Change {where}.{name}.")


def check_counts(where: str, options: object, *names: str) -> None:
    """Raise UserError for the first of the options that is neither None nor at least 1."""
    counts = [(name, getattr(options, name)) for name in names]
    check_options(where, *((name, given, given is None or given >= 1, "at least 1") for name, given in counts))


@dataclass
class Sampling:
    """The distribution that completions are sampled from.

    Args:
        num_generations: completions per prompt, `G`.
        max_completion_length: maximum number of tokens, including the end token.
        temperature: divides the logits; 0 means greedy, others are at least 0.01.
        top_p: keep the smallest set of tokens whose probability reaches it; 1.0 keeps all.
        top_k: keep the k most probable tokens; 0 keeps all.
        stop: strings that end a completion; they remain in its text.
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_counts("sampling", self, "num_generations", "max_completion_length")
        # Logits divided by less leave float32's range; vLLM would take 0.01 in its place.
        tempered = self.temperature == 0 or 0.01 <= self.temperature < math.inf
        check_options(
            "sampling",
            ("temperature", self.temperature, tempered, "0 (greedy) or 0.01 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "greater than 0 and at most 1"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or a positive number"),
        )

    @property
    def truncates(self) -> bool:
        """True if some tokens can never be sampled, so that log-probabilities are not those of the whole policy."""
        return self.top_p < 1 or self.top_k > 0


class RolloutEngine(ABC):
    """Generates completions with log-probabilities under the distribution they were sampled from."""

    runs_ahead = False
    """True if the engine can generate while the trainer trains."""
    uses_policy = False
    """True if the engine generates with the trained module and keeps no weights of its own."""

    def context_length(self, positions: int | None) -> int | None:
        """Return the maximum number of tokens of a prompt and its completion for a policy with so many positions.

        None if it is not known before the engine runs.
        """
        return positions

    def setup(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: Weights | None = None,
        folder: Path | None = None,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
        dtype: torch.dtype | None = None,
    ) -> None:
        """Attach the engine to a policy. Called once, before the first `push` and `generate`.

        Args:
            model: the policy.
            tokenizer: the policy's tokenizer.
            weights: returns all of the policy's tensors, for an engine that has lost them; None uses the state dict.
            folder: where an engine may write a log; None for no log.
            ranks: the trainer's processes. All of them push together, and each generates its share of the prompts.
            dtype: of the policy's files, which trained weights may exceed; None is that of `model`.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.weights = weights or (lambda: model.state_dict().items())
        self.folder = folder
        self.ranks = ranks
        self.policy_dtype = dtype or model.dtype
        self.prepare()

    def prepare(self) -> None:
        """Check the policy and start what the engine needs. Called by `setup`."""

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        """Return `G` completions of each prompt, in order.

        Args:
            prompts: `B` prompts of any lengths; empty on a rank without a share.
            sampling: `G` and the sampling distribution.
            seeds: int64 `[B, G]`. Completion (b, g) depends only on the policy, its prompt and `seeds[b, g]`, not on
                the rest of the batch.
            limits: int64 `[B, G]`: maximum number of tokens of each completion; None is
                `sampling.max_completion_length` for all, which none may exceed.

        Raises:
            UserError: a prompt has no tokens, or leaves no room for a completion within the engine's limit.
            FloatingPointError: the policy's logits are NaN or infinite.
            EngineError: vLLM has ended, or did not load the last push.
        """

    def generate_with_pilots(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, pilot: int, completed: Completed
    ) -> Groups:
        """Return the first `pilot` completions of each prompt, and all `G` of those prompts that are to be completed.

        Args:
            prompts: as for `generate`.
            sampling: as for `generate`.
            seeds: as for `generate`.
            pilot: completions of every prompt that are generated first, fewer than `G`.
            completed: called while the engine generates, with every prompt once.

        Raises:
            UserError, FloatingPointError, EngineError: as `generate`.
        """
        return pilots_first(self.generate, prompts, sampling, seeds, pilot, completed)

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Ahead:
        """Begin to generate like `generate`. An engine with `runs_ahead` returns at once, others when it is done.

        The completions come from the weights of the last push; the next push waits for them.
        """
        groups = self.generate(prompts, sampling, seeds, *([] if limits is None else [limits]))
        done: Future[float] = Future()
        done.set_result(0.0)
        return Ahead(done, lambda error: groups)

    def converse(self, conversations: Conversations, sampling: Sampling) -> None:
        """Generate the policy's turns of conversations with an environment, until all of them have ended. Collective.

        Args:
            conversations: those of this rank's share; none on a rank without a share.
            sampling: the distribution of a turn; `num_generations` is 1.

        Raises:
            UserError, FloatingPointError, EngineError: as `generate`.
        """
        requests = conversations.begin()
        while self.ranks.any(bool(requests)):
            # In rounds, each of which waits for its longest turn.
            longest = max((request.limit for request in requests), default=1)
            seeds = np.array([request.seed for request in requests], dtype=np.int64).reshape(-1, 1)
            limits = np.array([request.limit for request in requests], dtype=np.int64).reshape(-1, 1)
            turn = replace(sampling, max_completion_length=longest)
            turns = self.generate([request.prompt for request in requests], turn, seeds, limits)
            for request, (one,) in zip(requests, turns, strict=True):
                conversations.ended(request.conversation, one)
            requests = conversations.next()

    def settle(self) -> None:
        """Wait for the generation that `start` began."""

    @abstractmethod
    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Load the policy's weights after `version` optimizer updates into the engine.

        Args:
            named_tensors: the policy's tensors. They are consumed completely (which may need all ranks) or not at all.
            version: read back from the engine and recorded on every completion.
            since: version of an earlier push; tensors that are not given have not changed since then. An engine that no
                longer has that version loads all of `weights` instead. None if all tensors are given.

        Raises:
            EngineError: the weights do not fit the engine's model, or it did not load them.
        """

    def release(self) -> None:  # not every engine has something to free
        """Free memory that the update needs more. Called on all ranks before every update, after all its rollouts."""

    def close(self) -> None:
        """End the engine's processes and free its memory. May be called twice."""


def pilots_first(
    generate: Generate,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: np.ndarray,
    pilot: int,
    completed: Completed,
) -> Groups:
    """Return what `RolloutEngine.generate_with_pilots` does, with two calls of `generate`."""
    groups = generate(prompts, replace(sampling, num_generations=pilot), seeds[:, :pilot])
    chosen = completed(dict(enumerate(groups)))
    # Ranks without any take part: they may share the engine.
    rest = replace(sampling, num_generations=sampling.num_generations - pilot)
    for place, more in zip(
        chosen, generate([prompts[one] for one in chosen], rest, seeds[chosen, pilot:]), strict=True
    ):
        groups[place] += more
    return groups


def check_request(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: np.ndarray,
    limit: int | None,
    limit_name: str,
    limits: np.ndarray | None = None,
) -> None:
    """Reject a batch that contains a prompt which cannot be completed, before any of it runs.

    See `RolloutEngine.generate`. `limit` is the maximum number of tokens of a prompt and its completion together, or
    None; messages call it `limit_name`. Raises ValueError if `seeds` has another shape than `[B, G]`.
    """
    if seeds.shape != (len(prompts), sampling.num_generations):
        raise ValueError(f"seeds of shape {seeds.shape}, expected {(len(prompts), sampling.num_generations)}")
    for number, prompt in enumerate(prompts):
        length = len(prompt.token_ids)
        longest = sampling.max_completion_length if limits is None else int(limits[number].max())
        if length == 0:
            raise UserError(f"Prompt {prompt.id!r} has no tokens but needs at least one. Remove it from the data.")
        if limit is not None and length + longest > limit:
            raise UserError(
                f"Prompt {prompt.id!r} has {length} tokens and sampling.max_completion_length is "
                f"{sampling.max_completion_length}, which together exceed {limit_name}. "
                f"Lower sampling.max_completion_length, or start a new run with a max_prompt_length of the data of "
                f"{max(1, limit - sampling.max_completion_length)}."
            )


def limits_of(sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None) -> np.ndarray:
    """Return the maximum number of tokens of each completion, int64 `[B, G]`; see `RolloutEngine.generate`."""
    return np.full(seeds.shape, sampling.max_completion_length) if limits is None else limits


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the end tokens (int64) of the model's generation config and of its tokenizer."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = {*configured} if isinstance(configured, Iterable) else {configured}
    return np.array(sorted(i for i in ids | {tokenizer.eos_token_id} if i is not None), dtype=np.int64)


def nonfinite_policy(version: int) -> FloatingPointError:
    """Return the error for a policy whose logits are NaN or infinite."""
    return FloatingPointError(
        f"the policy's logits are NaN or infinite (version {version}): its weights have diverged or its dtype overflows"
    )
