"""Groups of unlike sizes: no prompt counts more for having more completions, by enumerating every batch.

The toy policy has two tokens, where 1 ends a completion, and at most two steps: the completions are 1, 01 and 00. A
batch has two prompts with rewards of their own, of 2 and of 3 completions: 3^5 batches, each with its chance. The
advantages and token weights are those of the training step; the expected gradient must be that of the mean over both.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from app.objective.logprobs import token_logprobs
from app.objective.options import SurrogateOptions
from app.objective.ratios import AGGREGATIONS
from app.objective.surrogate import policy_loss
from app.update import minibatch
from app.update.minibatch import advantages_of, minibatches
from datamodules.types import RolloutGroup
from tests.support.builders import completion, group, prompt
from tests.support.policies import group_of

F64 = torch.float64
COMPLETIONS = [(1,), (0, 1), (0, 0)]
REWARDS = [torch.tensor([0.2, 1.0, 0.0], dtype=F64), torch.tensor([0.6, 0.1, 0.9], dtype=F64)]
POLICY = torch.tensor([[0.3, -0.4], [0.8, 0.1]], dtype=F64)
SIZES = (2, 3)
MEAN, ALL, LIMIT = 2.5, 5, 2
CLOSE = {"rtol": 2e-6, "atol": 2e-7}  # advantages are float32


def probabilities(table: Tensor) -> Tensor:
    p = table.softmax(-1)
    return torch.stack([torch.stack([p[t, token] for t, token in enumerate(c)]).prod() for c in COMPLETIONS])


@cache
def scores() -> list[Tensor]:
    """The gradient of each completion's log-probability."""
    found = []
    for index in range(len(COMPLETIONS)):
        table = POLICY.clone().requires_grad_()
        found.append(torch.autograd.grad(probabilities(table)[index].log(), table)[0])
    return found


def exact(rewards: Tensor, divided_by_length: bool) -> Tensor:
    """The expectation of `(r - r') grad log pi` over independent completions, per token of the completion or not."""
    chance, total = probabilities(POLICY), torch.zeros_like(POLICY)
    for i, j in itertools.product(range(3), repeat=2):
        length = len(COMPLETIONS[i]) if divided_by_length else 1
        total += chance[i] * chance[j] * (rewards[i] - rewards[j]) * scores()[i] / length
    return total


def drawn(which: tuple[int, ...], of: int) -> RolloutGroup:
    nothing = [np.zeros(len(COMPLETIONS[one])) for one in which]
    rewards = [float(REWARDS[of][one]) for one in which]
    return group_of(prompt(of), [COMPLETIONS[one] for one in which], nothing, rewards, "fresh")


def expected_gradient(
    aggregation: Any, scale: Any, baseline: Any, sizes: tuple[int, ...] = SIZES, parts: int = 1, first: int = 0
) -> Tensor:
    """Minus the expected gradient of the loss of a batch, through the project's own functions."""
    chance, found = probabilities(POLICY), []
    for which in itertools.product(range(3), repeat=sum(sizes)):
        ends = np.cumsum(sizes)
        groups = [
            drawn(which[end - size : end], first + of) for of, (size, end) in enumerate(zip(sizes, ends, strict=True))
        ]
        likely = float(chance[list(which)].prod())
        for part in minibatches(
            groups, advantages_of(groups, scale, baseline), parts=parts, generator=np.random.default_rng(0),
            aggregation=aggregation, max_completion_length=LIMIT, keep_zero_advantage=False,
        ):  # fmt: skip
            found += [(one, likely * one.weight) for one in part.sequences]
    lengths = torch.tensor([len(one.completion_ids) for one, _ in found])
    prefixes = torch.cat([torch.arange(int(length)) for length in lengths])
    tokens = torch.cat([torch.from_numpy(np.asarray(one.completion_ids)).long() for one, _ in found])
    table = POLICY.clone().requires_grad_()
    logprobs, _ = token_logprobs(torch.eye(2, dtype=F64)[prefixes] @ table, torch.eye(2, dtype=F64), tokens)
    advantages, weights = (
        torch.tensor(values, dtype=F64).repeat_interleave(lengths)
        for values in ([one.advantage for one, _ in found], [weight for _, weight in found])
    )
    loss = policy_loss(logprobs, logprobs.detach(), advantages, weights, SurrogateOptions()).loss  # linear in weights
    return -torch.autograd.grad(loss, table)[0]


BIAS = {"leave_one_out": 1.0, "mean": (MEAN - 1) / MEAN, "batch": (ALL - 1) / ALL}
FACTOR = {"constant": 1 / LIMIT, "sequence_sum": 1.0, "token_sum": MEAN * 2, "sequence": 1.0}


@pytest.mark.parametrize("baseline", BIAS)
@pytest.mark.parametrize("aggregation", ["constant", "sequence_sum", "token_sum"])
def test_the_expected_gradient_is_that_of_the_mean_over_prompts(aggregation: str, baseline: str) -> None:
    whole = sum(exact(rewards, False) for rewards in REWARDS) / 2
    found = expected_gradient(aggregation, "none", baseline)
    torch.testing.assert_close(found, FACTOR[aggregation] * BIAS[baseline] * whole, **CLOSE)


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
def test_means_over_tokens_of_a_sequence(baseline: str) -> None:
    whole = sum(exact(rewards, True) for rewards in REWARDS) / 2
    torch.testing.assert_close(expected_gradient("sequence", "none", baseline), BIAS[baseline] * whole, **CLOSE)


def test_means_over_all_tokens() -> None:
    """A ratio of two means over prompts, written out: of gradients, and of tokens per completion."""
    chance, whole = probabilities(POLICY), torch.zeros_like(POLICY)
    for which in itertools.product(range(3), repeat=ALL):
        gradient, tokens = torch.zeros_like(POLICY), 0.0
        for rewards, its in zip(REWARDS, (which[:2], which[2:]), strict=True):
            for place, one in enumerate(its):
                others = torch.stack([rewards[it] for it in its[:place] + its[place + 1 :]]).mean()
                gradient += (rewards[one] - others) * scores()[one] / len(its)
                tokens += len(COMPLETIONS[one]) / len(its)
        whole += chance[list(which)].prod() * gradient / tokens
    torch.testing.assert_close(expected_gradient("token", "none", "leave_one_out"), whole, **CLOSE)


@pytest.mark.parametrize("aggregation", ["constant", "token_sum"])
def test_mini_batches_of_unlike_sizes_add_up(aggregation: str) -> None:
    whole = sum(exact(rewards, False) for rewards in REWARDS) / 2
    steps = 2 if aggregation == "constant" else 1
    found = expected_gradient(aggregation, "none", "mean", parts=2)
    torch.testing.assert_close(found, steps * FACTOR[aggregation] * BIAS["mean"] * whole, **CLOSE)


def test_divided_by_its_deviation_a_group_has_the_gradient_of_groups_of_its_size() -> None:
    alone = [
        expected_gradient("sequence_sum", "group", "leave_one_out", (size,), first=of) for of, size in enumerate(SIZES)
    ]
    found = expected_gradient("sequence_sum", "group", "leave_one_out")
    torch.testing.assert_close(found, sum(alone) / 2, **CLOSE)


@pytest.mark.parametrize("aggregation", ["constant", "sequence", "sequence_sum", "token_sum"])
def test_weights_of_equal_sizes_are_told_apart(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: without shares the larger group has 3/5 of the gradient, and not a half."""
    plain = minibatch.token_weights
    monkeypatch.setattr(minibatch, "token_weights", lambda *given, **more: plain(*given, **{**more, "shares": None}))
    found = expected_gradient(aggregation, "none", "leave_one_out")
    by_prompt = [exact(rewards, aggregation == "sequence") for rewards in REWARDS]
    whole = FACTOR[aggregation] * sum(by_prompt) / 2
    assert (found - whole).norm() > 0.05 * whole.norm()
    torch.testing.assert_close(found, FACTOR[aggregation] * (0.4 * by_prompt[0] + 0.6 * by_prompt[1]), **CLOSE)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_repeated_completions_change_no_gradient(aggregation: Any) -> None:
    """A group whose completions are all there three times weighs as it does with each once."""
    first = group(prompt(0), [0.0, 1.0])
    its = (completion((4, 5, 6)), completion((5,)))
    once, again = ([first, replace(group(prompt(1), [1.0, 0.0] * times), completions=its * times)] for times in (1, 3))

    def gradients(groups: list[RolloutGroup]) -> np.ndarray:
        advantages = [one.rewards - 0.5 for one in groups]
        (part,) = minibatches(
            groups, advantages, parts=1, generator=np.random.default_rng(0), aggregation=aggregation,
            max_completion_length=4, keep_zero_advantage=False,
        )  # fmt: skip
        total = np.zeros((2, 10))
        for one in part.sequences:
            np.add.at(total[one.group], np.asarray(one.completion_ids), one.weight * one.advantage)
        return total / np.abs(total).sum() if aggregation == "token_sum" else total

    np.testing.assert_allclose(gradients(again), gradients(once), rtol=1e-6)


def test_equal_sizes_are_what_they_were() -> None:
    groups = [group(prompt(index), rewards) for index, rewards in enumerate([[0.2, 0.7, 1.0], [0.1, 0.9, 0.3]])]
    for baseline in ("mean", "optimal"):
        together = advantages_of(groups, "none", baseline)
        for whole, one in zip(together, groups, strict=True):
            lengths = np.array([len(its.token_ids) for its in one.completions], dtype=np.float32)
            weights = lengths if baseline == "optimal" else np.ones(3, np.float32)
            mean = np.float32((weights * one.rewards).sum() / weights.sum())
            np.testing.assert_allclose(whole, one.rewards - mean, atol=1e-7)
