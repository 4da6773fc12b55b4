"""The interface of whatever generates rollouts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from app.engines.ahead import Ahead
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

Weights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""Gives the policy's tensors by name, as they are at the call."""


@dataclass
class Sampling:
    """How completions are drawn.

    Args:
        num_generations: completions per prompt, `G`.
        max_completion_length: tokens, the end token included.
        temperature: logits are divided by it; 0 means greedy.
        top_p: keep the smallest set of tokens whose probability reaches it; 1.0 keeps all.
        top_k: keep the k most probable tokens; 0 keeps all.
        stop: strings that end a completion (kept in its text).
    """

    num_generations: int = 8
    max_completion_length: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        checks = [
            ("num_generations", self.num_generations, self.num_generations >= 1, "at least 1"),
            ("max_completion_length", self.max_completion_length, self.max_completion_length >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "in (0, 1]"),
            ("top_k", self.top_k, self.top_k >= 0, "0 (off) or more"),
        ]
        for name, given, fine, expected in checks:
            if not fine:
                raise UserError(f"sampling.{name}={given}: expected {expected}")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can never be drawn, so that importance ratios against the full policy are biased."""
        return self.top_p < 1 or self.top_k > 0 or self.temperature == 0


class RolloutEngine(ABC):
    """Generates completions with the log-probabilities of the distribution that was really sampled from."""

    runs_ahead = False
    """Whether it can generate while the trainer trains."""
    uses_policy = False
    """Whether it generates with the trained module itself, and has no weights of its own."""

    def setup(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        weights: Weights | None = None,
        folder: Path | None = None,
    ) -> None:
        """Called once with the policy, before the first `push` and `generate`.

        Args:
            model: the policy.
            tokenizer: the policy's.
            weights: gives what `push` would be given now, for an engine that has lost its own; None is the model's.
            folder: where an engine may leave a log; None for no log.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.weights = weights or (lambda: model.state_dict().items())
        self.folder = folder

    @abstractmethod
    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray
    ) -> list[tuple[Completion, ...]]:
        """Completions of every prompt, in order.

        Args:
            prompts: `B` prompts, of any lengths.
            sampling: `G` and the sampling distribution.
            seeds: int64 `[B, G]`; completion (b, g) depends on the policy, its prompt and `seeds[b, g]` alone: not on
                the batch it is generated in.
        """

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> Ahead:
        """As `generate`, without waiting: for engines that do not need this process (`runs_ahead`).

        The weights are those of the last push; the next one waits.
        """
        raise UserError(
            f"engines.{type(self).__name__} generates in the trainer's process, so not while it trains: "
            "use engines.VllmServer, or leave callbacks.RolloutAhead out"
        )

    def settle(self) -> None:
        """Waits for what `start` began."""

    @abstractmethod
    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Makes the engine's weights those of the policy after `version` optimizer updates."""

    def close(self) -> None:
        """Ends processes and frees memory. May be called twice."""
