"""The module's gradient, from drawn completions, is the exact policy gradient within its Monte Carlo error.

A real transformer over four tokens, where 1 ends a completion, and three steps at most: 40 completions, enumerated.
Groups are drawn from the policy itself, or from an older one and taken through the replay buffer. Stated error: the
standard error over 20 batches of 400 groups, at most 3.5% of the exact gradient along its own direction; an estimate
passes within 4 standard errors along that direction and along 20 random ones.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.engines import Sampling
from app.objective.options import SurrogateOptions
from callbacks.algorithm.replay_buffer import ReplayBuffer
from datamodules.types import Prompt, RolloutGroup
from tests.support.policies import flat_gradient, gradient, group_of, module_on, tiny_model

END, LIMIT, BATCHES, GROUPS = 1, 3, 20, 400
FREE = [0, 2, 3]
COMPLETIONS = [
    (*head, END) for length in range(LIMIT) for head in itertools.product(FREE, repeat=length)
] + list(itertools.product(FREE, repeat=LIMIT))  # fmt: skip
REWARDS = np.random.default_rng(5).random(len(COMPLETIONS)).round(2)
START = (2,)
NO_LIMITS: dict[str, Any] = {"epsilon_low": 1.0, "epsilon_high": float("inf"), "importance_cap": float("inf")}


def token_logprobs(model: Any) -> list[Tensor]:
    """Return log-probabilities `[T]` of every completion, by the plain softmax of the model's logits."""
    found = []
    for completion in COMPLETIONS:
        logits = model(torch.tensor([START + completion])).logits[0, len(START) - 1 : -1]
        found.append(logits.log_softmax(-1)[range(len(completion)), completion])
    return found


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_model(4, seed=0)


@pytest.fixture(scope="module")
def older() -> Any:
    """The policy with other weights: the ratio of a completion's probabilities varies by a factor of about two."""
    model = tiny_model(4, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@pytest.fixture(scope="module")
def exact(policy: Any) -> Tensor:
    policy.zero_grad(set_to_none=True)
    chances = torch.stack([values.sum() for values in token_logprobs(policy)]).exp()
    assert float(chances.detach().sum()) == pytest.approx(1.0)
    (chances * torch.from_numpy(REWARDS)).sum().backward()
    return flat_gradient(policy)


def draw(chances: np.ndarray, logprobs: list[np.ndarray], seed: int) -> list[RolloutGroup]:
    """Groups of two completions each, of prompts that differ in their id alone."""
    chosen = np.random.default_rng(seed).choice(len(COMPLETIONS), size=(GROUPS, 2), p=chances / chances.sum())
    return [
        group_of(
            Prompt(f"p{row}", row, "", "", START, {}),
            [COMPLETIONS[one] for one in pair],
            [logprobs[one] for one in pair],
            [float(REWARDS[one]) for one in pair],
            "fresh",
        )
        for row, pair in enumerate(chosen)
    ]


def estimates(
    policy: Any, behaviour: Any, replayed: bool, mini_batches: int, claimed: Any = None, **options: Any
) -> Tensor:
    """Return estimates of the gradient of the expected reward, `[BATCHES, P]`."""
    module = module_on(
        policy, surrogate=SurrogateOptions(**options), advantage_scale="none", advantage_baseline="leave_one_out",
        aggregation="constant", mini_batches=mini_batches, sampling=Sampling(max_completion_length=LIMIT),
    )  # fmt: skip
    with torch.no_grad():
        chances = np.exp([float(values.sum()) for values in token_logprobs(behaviour)])
        logprobs = [values.numpy() for values in token_logprobs(claimed or behaviour)]
    rows = []
    for batch in range(BATCHES):
        groups = draw(chances, logprobs, batch)
        if replayed:
            buffer = ReplayBuffer(GROUPS)
            buffer.insert(groups)
            stored = buffer.draw(GROUPS, np.random.default_rng(batch))
            assert len(stored) == GROUPS
            groups = [dataclasses.replace(group, source="replay") for group in stored]
        rows.append(-LIMIT / mini_batches * gradient(module, groups))
    return torch.stack(rows)


def deviations(found: Tensor, exact: Tensor) -> tuple[Tensor, float]:
    """Distance from the exact gradient in standard errors, along it `[0]` and 20 random directions, and the first's
    standard error relative to the exact gradient."""
    random = torch.randn(20, len(exact), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    directions = torch.nn.functional.normalize(torch.cat([exact[None], random]), dim=1)
    along = found @ directions.T
    error = along.std(0) / BATCHES**0.5
    return (along.mean(0) - directions @ exact) / error, float(error[0] / exact.norm())


def test_on_policy(policy: Any, exact: Tensor) -> None:
    distance, error = deviations(estimates(policy, policy, False, 1), exact)
    assert error < 0.035
    assert distance.abs().max() < 4


@pytest.mark.parametrize("mini_batches", [1, 2])
def test_replayed_from_an_older_policy(policy: Any, older: Any, exact: Tensor, mini_batches: int) -> None:
    options = {"importance_level": "sequence", **NO_LIMITS}
    distance, error = deviations(estimates(policy, older, True, mini_batches, **options), exact)
    assert error < 0.035
    assert distance.abs().max() < 4


def test_replay_taken_for_fresh_is_told_apart(policy: Any, older: Any, exact: Tensor) -> None:
    """The check can fail: it refuses completions of the older policy that claim the current policy's log-probs."""
    distance, error = deviations(estimates(policy, older, True, 1, claimed=policy, **NO_LIMITS), exact)
    assert error < 0.035
    assert distance.abs().max() > 10
