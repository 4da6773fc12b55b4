"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2), of one reward or of several apart."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.errors import UserError, nearest
from datamodules.types import REWARD_TOLERANCE

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")
Baseline = Literal["mean", "leave_one_out"]
BASELINES = ("mean", "leave_one_out")
STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, in reward units (as verl does)."""


def group_advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group", baseline: Baseline = "mean") -> Tensor:
    """How much better each completion did than its group.

    A group whose rewards are equal (within `REWARD_TOLERANCE`), and so every group of one completion, gets exactly 0:
    a mean that is off by one rounding would else be blown up by the division.

    Args:
        rewards: float `[N]`.
        groups: int `[N]`: which group a completion belongs to. Any numbers, in any order; sizes may differ, because a
            completion whose reward failed is left out.
        scale: "group" divides `r - baseline` by the group's unbiased standard deviation + 1e-6 (GRPO); "batch" by the
            unbiased standard deviation of all `N` rewards + 1e-6; "none" does not divide (Dr. GRPO, arXiv 2503.20783,
            and DOTS, arXiv 2506.05316).
        baseline: "mean" of the group, the completion itself included; "leave_one_out" is the mean of the others
            (RLOO, arXiv 2402.14740, equation 7), which makes the policy gradient unbiased: with the mean it is
            `(G - 1) / G` of it.

    Returns:
        Float `[N]` of the rewards' type (float32 for integers), without gradient.

    Raises:
        UserError: an unknown `scale` or `baseline`.
        ValueError: shapes that do not match.
    """
    _known("scale", scale, SCALES)
    _known("baseline", baseline, BASELINES)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)}: expected both to be [N]")
    if not rewards.numel():
        return torch.zeros_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    _, member = torch.unique(groups, return_inverse=True)
    size = _group_sum(torch.ones_like(rewards), member)
    centred = rewards - _group_sum(rewards, member) / size
    centred = torch.where(_group_range(rewards, member) > REWARD_TOLERANCE, centred, 0.0)
    # r - mean of the others = G / (G - 1) (r - mean of all); the deviations that are divided by stay the group's own.
    advantages = centred if baseline == "mean" else centred * (size / (size - 1).clamp(min=1))
    if scale == "group":
        return advantages / (torch.sqrt(_group_sum(centred**2, member) / (size - 1).clamp(min=1)) + STD_EPSILON)
    if scale == "batch" and len(rewards) > 1:
        return advantages / (rewards.std() + STD_EPSILON)
    return advantages


def decoupled_advantages(
    components: Tensor, reward_weights: Tensor, groups: Tensor, scale: Scale = "batch", baseline: Baseline = "mean"
) -> Tensor:
    """Several rewards, each normalised within its groups before they are weighted and added (GDPO, arXiv 2601.05242).

    A reward with a small spread then counts as much as one with a large spread; added first, it would drown. A
    completion that a reward does not apply to takes no part in that reward's mean and spread.

    Args:
        components: float `[N, R]`: each of the `R` rewards of each completion, NaN where it does not apply.
        reward_weights: float `[R]`.
        groups: int `[N]`, as in `group_advantages`.
        scale: "batch" divides the weighted sums by their unbiased standard deviation over the batch + 1e-6 (GDPO, and
            TRL's `normalize_then_sum`); "group" leaves them as they are.
        baseline: as in `group_advantages`.

    Returns:
        Float `[N]`. Exactly 0 where every reward is equal within the group.

    Raises:
        UserError: `scale="none"`, which would normalise nothing, or another unknown name.
        ValueError: shapes that do not match.
    """
    _known("scale", scale, SCALES)
    if scale == "none":
        raise UserError(
            "advantage_scale='none' with multi_objective_aggregation='normalize_then_sum': nothing would be "
            "normalised; set advantage_scale to 'batch' (GDPO) or 'group', or sum_then_normalize"
        )
    if components.ndim != 2 or components.shape != (len(groups), len(reward_weights)):
        shapes = f"components {tuple(components.shape)}, reward_weights {tuple(reward_weights.shape)}"
        raise ValueError(f"{shapes}, groups {tuple(groups.shape)}: expected [N, R], [R] and [N]")
    apart = torch.zeros_like(components)
    for column in range(components.shape[1]):
        here = ~torch.isnan(components[:, column])
        apart[here, column] = group_advantages(components[here, column], groups[here], "group", baseline)
    advantages = apart @ reward_weights.to(components.dtype)
    # Every group's sum is 0, so that subtracting the batch's mean, as TRL does, would only add rounding to exact zeros.
    return advantages / (advantages.std() + STD_EPSILON) if scale == "batch" and len(groups) > 1 else advantages


def _known(name: str, given: str, valid: tuple[str, ...]) -> None:
    if given not in valid:
        raise UserError(f"{name}={given!r}: expected one of {', '.join(valid)}; {nearest(given, valid)}")


def _group_sum(values: Tensor, member: Tensor) -> Tensor:
    """Sum over each element's group `[N]`."""
    return torch.zeros_like(values).index_add(0, member, values)[member]


def _group_range(values: Tensor, member: Tensor) -> Tensor:
    """Largest minus smallest value of each element's group `[N]`."""
    start = torch.zeros_like(values)
    largest = start.scatter_reduce(0, member, values, "amax", include_self=False)
    smallest = start.scatter_reduce(0, member, values, "amin", include_self=False)
    return (largest - smallest)[member]
