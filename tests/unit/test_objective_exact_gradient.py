"""The expected gradient of the loss equals the exact policy gradient, by enumerating every completion.

The toy policy has two tokens, where 1 ends a completion, and at most three steps: the completions are 1, 01, 001,
000, of different lengths. Its logits depend on the whole prefix, so three prefixes ("", "0", "00") make six numbers.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from app.objective.advantages import group_advantages
from app.objective.logprobs import token_logprobs
from app.objective.options import SurrogateOptions
from app.objective.ratios import token_weights
from app.objective.surrogate import policy_loss

F64 = torch.float64
COMPLETIONS = [(1,), (0, 1), (0, 0, 1), (0, 0, 0)]
REWARDS = torch.tensor([0.2, 1.0, 0.0, 0.7], dtype=F64)
POLICY = torch.tensor([[0.3, -0.4], [0.8, 0.1], [-0.2, 0.5]], dtype=F64)
BEHAVIOUR = torch.tensor([[-0.5, 0.6], [0.1, 0.9], [1.3, -0.7]], dtype=F64)
MAX_LENGTH = 3
NO_LIMITS: dict[str, Any] = {"epsilon_low": 1.0, "epsilon_high": float("inf"), "importance_cap": float("inf")}


def probabilities(table: Tensor) -> Tensor:
    """Return each completion's probability as the product of its softmax probabilities."""
    p = table.softmax(-1)
    return torch.stack([torch.stack([p[t, token] for t, token in enumerate(c)]).prod() for c in COMPLETIONS])


def exact_gradient(rewards: Tensor = REWARDS) -> Tensor:
    table = POLICY.clone().requires_grad_()
    return torch.autograd.grad((probabilities(table) * rewards).sum(), table)[0]


def estimate(group: tuple[int, ...], advantages: Tensor, behaviour: Tensor, options: SurrogateOptions) -> Tensor:
    """Minus the loss's gradient for one drawn group, through the project's own functions."""
    table = POLICY.clone().requires_grad_()
    lengths = torch.tensor([len(COMPLETIONS[index]) for index in group])
    prefixes = torch.cat([torch.arange(int(length)) for length in lengths])
    tokens = torch.tensor([token for index in group for token in COMPLETIONS[index]])
    logprobs, _ = token_logprobs(torch.eye(3, dtype=F64)[prefixes] @ table, torch.eye(2, dtype=F64), tokens)
    weights = token_weights(lengths.to(F64), "constant", max_completion_length=MAX_LENGTH).repeat_interleave(lengths)
    loss = policy_loss(
        logprobs,
        behaviour.log_softmax(-1)[prefixes, tokens],
        advantages.repeat_interleave(lengths),
        weights,
        options,
        sequences=torch.arange(len(group)).repeat_interleave(lengths),
    ).loss
    return -torch.autograd.grad(loss, table)[0]


@pytest.mark.parametrize("size", [2, 3])
def test_on_policy_groups(size: int) -> None:
    """E[g] = (G - 1) / G grad J / max length: the group mean holds each completion's own reward 1 / G times."""
    chance = probabilities(POLICY)
    expected = torch.zeros_like(POLICY)
    for group in itertools.product(range(4), repeat=size):
        advantages = group_advantages(REWARDS[list(group)], torch.zeros(size, dtype=torch.int64), "none")
        expected += chance[list(group)].prod() * estimate(group, advantages, POLICY, SurrogateOptions())
    torch.testing.assert_close(expected, (size - 1) / size * exact_gradient() / MAX_LENGTH, rtol=1e-10, atol=1e-12)


def test_any_constant_baseline() -> None:
    chance = probabilities(POLICY)
    total = sum(chance[i] * estimate((i,), REWARDS[[i]] - 0.37, POLICY, SurrogateOptions()) for i in range(4))
    torch.testing.assert_close(total, exact_gradient() / MAX_LENGTH, rtol=1e-10, atol=1e-12)


def test_replayed_completions_with_sequence_importance() -> None:
    """Drawn from another policy and weighted by the product of ratios, the estimate is unbiased."""
    chance = probabilities(BEHAVIOUR)
    options = SurrogateOptions(importance_level="sequence", **NO_LIMITS)
    total = sum(chance[i] * estimate((i,), REWARDS[[i]] - 0.37, BEHAVIOUR, options) for i in range(4))
    torch.testing.assert_close(total, exact_gradient() / MAX_LENGTH, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("center", ["old", "behaviour"])
def test_replayed_completions_with_token_importance(center: str) -> None:
    """Per-token ratios (the paper's) weight each token alone: E_mu[sum_t pi_t / mu_t A grad log pi_t], written out.

    It is the exact gradient only where the prefixes' own chances agree: for the first token. The second assertion
    keeps the difference on record.
    """
    options = SurrogateOptions(clip_center=center, **NO_LIMITS)  # type: ignore[arg-type]
    chance = probabilities(BEHAVIOUR)
    total = sum(chance[i] * estimate((i,), REWARDS[[i]] - 0.37, BEHAVIOUR, options) for i in range(4))
    pi, mu = POLICY.softmax(-1), BEHAVIOUR.softmax(-1)
    written = torch.zeros_like(POLICY)
    for index, completion in enumerate(COMPLETIONS):
        for step, token in enumerate(completion):
            score = torch.eye(2, dtype=F64)[token] - pi[step]
            written[step] += chance[index] * pi[step, token] / mu[step, token] * (REWARDS[index] - 0.37) * score
    torch.testing.assert_close(total, written / MAX_LENGTH, rtol=1e-10, atol=1e-12)
    assert (written - exact_gradient()).norm() > 0.01 * exact_gradient().norm()


def test_one_token_completions_are_unbiased_token_by_token() -> None:
    """If the first token decides the reward, its row of the gradient is exact under per-token ratios."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=F64)
    chance = probabilities(BEHAVIOUR)
    options = SurrogateOptions(**NO_LIMITS)
    total = sum(chance[i] * estimate((i,), rewards[[i]] - 0.37, BEHAVIOUR, options) for i in range(4))
    assert isinstance(total, Tensor)
    torch.testing.assert_close(total[0], exact_gradient(rewards)[0] / MAX_LENGTH, rtol=1e-10, atol=1e-12)


def test_the_objective_stands_on_torch_and_the_data_types_alone() -> None:
    """No trainer, no model library: what a fresh interpreter has loaded after importing every file of it."""
    code = (
        "import sys, app.objective.advantages, app.objective.surrogate, app.objective.logprobs, app.objective.packing;"
        "print([name for name in ('lightning', 'transformers', 'callbacks', 'app.engines') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True, timeout=60
    )
    assert shown.stdout.strip() == "[]"
