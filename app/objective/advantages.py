"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from datamodules.errors import UserError, nearest
from datamodules.types import REWARD_TOLERANCE

Scale = Literal["group", "batch", "none"]
SCALES = ("group", "batch", "none")
STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, in reward units (as verl does)."""


def group_advantages(rewards: Tensor, groups: Tensor, scale: Scale = "group") -> Tensor:
    """How much better each completion did than the mean of its group.

    A group whose rewards are equal (within `REWARD_TOLERANCE`), and so every group of one completion, gets exactly 0:
    a mean that is off by one rounding would else be blown up by the division.

    Args:
        rewards: float `[N]`.
        groups: int `[N]`: which group a completion belongs to. Any numbers, in any order; sizes may differ, because a
            completion whose reward failed is left out.
        scale: "group" divides `r - mean` by the group's unbiased standard deviation + 1e-6 (GRPO); "batch" by the
            unbiased standard deviation of all `N` rewards + 1e-6; "none" does not divide (Dr. GRPO, arXiv 2503.20783,
            and DOTS, arXiv 2506.05316).

    Returns:
        Float `[N]` of the rewards' type (float32 for integers), without gradient.

    Raises:
        UserError: an unknown `scale`.
        ValueError: shapes that do not match.
    """
    if scale not in SCALES:
        raise UserError(f"scale={scale!r}: expected how to scale advantages; {nearest(str(scale), SCALES)}")
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)}: expected both to be [N]")
    if not rewards.numel():
        return torch.zeros_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    _, member = torch.unique(groups, return_inverse=True)
    size = _group_sum(torch.ones_like(rewards), member)
    centred = rewards - _group_sum(rewards, member) / size
    centred = torch.where(_group_range(rewards, member) > REWARD_TOLERANCE, centred, 0.0)
    if scale == "group":
        return centred / (torch.sqrt(_group_sum(centred**2, member) / (size - 1).clamp(min=1)) + STD_EPSILON)
    if scale == "batch" and len(rewards) > 1:
        return centred / (rewards.std() + STD_EPSILON)
    return centred


def _group_sum(values: Tensor, member: Tensor) -> Tensor:
    """Sum over each element's group `[N]`."""
    return torch.zeros_like(values).index_add(0, member, values)[member]


def _group_range(values: Tensor, member: Tensor) -> Tensor:
    """Largest minus smallest value of each element's group `[N]`."""
    start = torch.zeros_like(values)
    largest = start.scatter_reduce(0, member, values, "amax", include_self=False)
    smallest = start.scatter_reduce(0, member, values, "amin", include_self=False)
    return (largest - smallest)[member]
