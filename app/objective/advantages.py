"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2), of one reward or of several decoupled ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from app.objective.ratios import check_choice
from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")
Baseline = Literal["mean", "leave_one_out"]
BASELINES = ("mean", "leave_one_out")
STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, in reward units (as verl does)."""


def group_advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group", baseline: Baseline = "mean") -> Tensor:
    """Return the advantage of each completion over its group.

    A group whose rewards are equal within `REWARD_TOLERANCE`, such as a group of one, gets exactly 0: dividing would
    otherwise amplify the rounding error of its mean.

    Args:
        rewards: float `[N]`.
        groups: int `[N]`, the group of each completion: any numbers in any order. Sizes may differ, because a
            completion whose reward failed is left out.
        scale: "group" divides `r - baseline` by the group's unbiased standard deviation + 1e-6 (GRPO); "batch" by the
            unbiased standard deviation of all `N` rewards + 1e-6; "none" does not divide (Dr. GRPO, arXiv 2503.20783,
            and DOTS as printed, arXiv 2506.05316; its authors' code is "group").
        baseline: "mean" of the group, the completion itself included; "leave_one_out" is the mean of the others
            (RLOO, arXiv 2402.14740, equation 7), which makes the policy gradient unbiased: with "mean" it is
            `(G - 1) / G` of it.

    Returns:
        Float `[N]` of the rewards' type (float32 for integers), without gradient.

    Raises:
        UserError: an unknown `scale` or `baseline`.
        ValueError: shapes that do not match.
    """
    check_choice("scale", scale, SCALES)
    check_choice("baseline", baseline, BASELINES)
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)}: expected both to be [N]")
    if not rewards.numel():
        return torch.zeros_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    _, member = torch.unique(groups, return_inverse=True)
    zeros = torch.zeros_like(rewards)
    size = _group_sum(torch.ones_like(rewards), member)
    largest = zeros.scatter_reduce(0, member, rewards, "amax", include_self=False)[member]
    smallest = zeros.scatter_reduce(0, member, rewards, "amin", include_self=False)[member]
    centred = rewards - _group_sum(rewards, member) / size
    centred = torch.where(largest - smallest > REWARD_TOLERANCE, centred, 0.0)
    # r - mean of the others = G / (G - 1) (r - mean of all). The standard deviation stays the group's own.
    advantages = centred if baseline == "mean" else centred * (size / (size - 1).clamp(min=1))
    if scale == "group":
        return advantages / (torch.sqrt(_group_sum(centred**2, member) / (size - 1).clamp(min=1)) + STD_EPSILON)
    if scale == "batch" and len(rewards) > 1:
        return advantages / (rewards.std() + STD_EPSILON)
    return advantages


def decoupled_advantages(
    components: Tensor, reward_weights: Tensor, groups: Tensor, scale: Scale = "batch", baseline: Baseline = "mean"
) -> Tensor:
    """Return advantages of several rewards, each normalised within its groups before the sum (GDPO, arXiv 2601.05242).

    Args:
        components: float `[N, R]`: each of the `R` rewards of each completion; NaN, where a reward does not apply, is
            left out of its mean and spread.
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
    check_choice("scale", scale, SCALES)
    if scale == "none":
        raise UserError(
            "advantage_scale is 'none' with multi_objective_aggregation='normalize_then_sum', which would normalise "
            "nothing. Set advantage_scale to 'batch' (GDPO) or 'group', or use 'sum_then_normalize'."
        )
    if components.ndim != 2 or components.shape != (len(groups), len(reward_weights)):
        shapes = f"components {tuple(components.shape)}, reward_weights {tuple(reward_weights.shape)}"
        raise ValueError(f"{shapes}, groups {tuple(groups.shape)}: expected [N, R], [R] and [N]")
    decoupled = torch.zeros_like(components)
    for column in range(components.shape[1]):
        applies = ~torch.isnan(components[:, column])
        decoupled[applies, column] = group_advantages(components[applies, column], groups[applies], "group", baseline)
    advantages = decoupled @ reward_weights.to(components.dtype)
    # Each group sums to 0: subtracting the batch's mean, as TRL does, would only add rounding errors to exact zeros.
    return advantages / (advantages.std() + STD_EPSILON) if scale == "batch" and len(groups) > 1 else advantages


def _group_sum(values: Tensor, member: Tensor) -> Tensor:
    """Return the sum over each element's group, `[N]`."""
    return torch.zeros_like(values).index_add(0, member, values)[member]
