"""Group-relative advantages (GRPO, arXiv 2402.03300, section 4.1.2), of one reward or of several decoupled ones."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from app.objective.ratios import check_choice
from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE

Scale = Literal["group", "batch", "batch_centred", "none"]
SCALES = ("group", "batch", "batch_centred", "none")
Baseline = Literal["mean", "leave_one_out", "optimal", "batch"]
BASELINES = ("mean", "leave_one_out", "optimal", "batch")
BATCH_IN_GROUPS = (
    "advantage_baseline is 'batch' and rewards are divided by the standard deviation of their group, which is 0 for "
    "equal rewards."
)
STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it, in reward units (as verl does)."""


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the advantage of each completion over its group, or with `baseline="batch"` over the batch.

    A group (or batch) whose rewards are equal within `REWARD_TOLERANCE`, such as a group of one, gets exactly 0:
    dividing would otherwise amplify the rounding error of its mean.

    Where sizes differ, no prompt counts more for having more completions: a baseline of the group that includes the
    completion itself takes `1 / n` of its gradient away, so that the differences of a group of `n` are multiplied by
    `n / (n - 1)` relative to a group of the mean size, and deviations over the batch weigh groups alike. Dividing by
    the group's own deviation is not linear: the gradient of a prompt is then that of groups of its own size.

    Args:
        rewards: float `[N]`.
        groups: int `[N]`, the group of each completion: any numbers in any order. Sizes may differ, because prompts
            are given unlike numbers of completions or because a completion whose reward failed is left out.
        scale: "group" divides `r - baseline` by the group's unbiased standard deviation + 1e-6 (GRPO); "batch" by the
            unbiased standard deviation of all `N` rewards + 1e-6; "batch_centred" by that of all `N` differences
            `r - baseline` + 1e-6 (REINFORCE++-baseline, arXiv 2501.03262, per completion and not per token as there);
            "none" does not divide (Dr. GRPO, arXiv 2503.20783, and DOTS as printed, arXiv 2506.05316; its authors' code
            is "group").
        baseline: "mean" of the group, the completion itself included; "leave_one_out" is the mean of the others
            (RLOO, arXiv 2402.14740, equation 7), which makes the policy gradient unbiased: with "mean" it is
            `(G - 1) / G` of it; "optimal" is the group's mean weighted by length (OPO, arXiv 2505.23585, equation 10);
            "batch" is the mean of all `N` rewards (REINFORCE++, arXiv 2501.03262), under which equal groups teach too.
        lengths: float `[N]`, tokens of each completion; required by "optimal".

    Returns:
        Float `[N]` of the rewards' type (float32 for integers), without gradient.

    Raises:
        UserError: an unknown `scale` or `baseline`, or `baseline="batch"` with `scale="group"`.
        ValueError: shapes that do not match, or missing lengths.
    """
    check_choice("scale", scale, SCALES)
    check_choice("baseline", baseline, BASELINES)
    if (baseline, scale) == ("batch", "group"):
        raise UserError(f"{BATCH_IN_GROUPS} Set advantage_scale to batch or none.")
    if rewards.ndim != 1 or rewards.shape != groups.shape:
        raise ValueError(f"rewards {tuple(rewards.shape)} and groups {tuple(groups.shape)}: expected both to be [N]")
    if not rewards.numel():
        return torch.zeros_like(rewards, dtype=torch.promote_types(rewards.dtype, torch.float32))
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    _, member = torch.unique(groups, return_inverse=True)
    advantages = _differences(rewards, member, baseline, lengths)
    if baseline in ("mean", "optimal"):
        advantages = advantages * _correction(member).to(advantages.dtype)
    if scale == "group":
        return advantages / (_group_std(rewards, member) + STD_EPSILON)
    if scale != "none" and len(rewards) > 1:
        return advantages / (_batch_std(rewards if scale == "batch" else advantages, member) + STD_EPSILON)
    return advantages


def decoupled_advantages(
    components: Tensor,
    reward_weights: Tensor,
    groups: Tensor,
    scale: Scale = "batch",
    baseline: Baseline = "mean",
    lengths: Tensor | None = None,
) -> Tensor:
    """Return advantages of several rewards, each normalised within its groups before the sum (GDPO, arXiv 2601.05242).

    Args:
        components: float `[N, R]`: each of the `R` rewards of each completion; NaN, where a reward does not apply, is
            left out of its mean and spread.
        reward_weights: float `[R]`.
        groups: int `[N]`, as in `group_advantages`.
        scale: "batch" and "batch_centred" divide the weighted sums by their unbiased standard deviation over the batch
            + 1e-6 (GDPO, and TRL's `normalize_then_sum`); "group" leaves them as they are.
        baseline: as in `group_advantages`.
        lengths: as in `group_advantages`.

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
    _, member = torch.unique(groups, return_inverse=True)
    decoupled = torch.zeros_like(components)
    for column in range(components.shape[1]):
        applies = ~torch.isnan(components[:, column])
        if not applies.any():
            continue
        rewards, (_, its) = components[applies, column], torch.unique(groups[applies], return_inverse=True)
        chosen = None if lengths is None else lengths[applies]
        difference = _differences(rewards, its, baseline, chosen)
        decoupled[applies, column] = difference / (_group_std(rewards, its) + STD_EPSILON)
    advantages = decoupled @ reward_weights.to(components.dtype)
    if baseline in ("mean", "optimal") and len(groups):  # by whole groups, not by those to whom a reward applies
        advantages = advantages * _correction(member).to(advantages.dtype)
    if scale == "group" or len(groups) < 2:
        return advantages
    # Each group sums to 0: subtracting the batch's mean, as TRL does, would only add rounding errors to exact zeros.
    return advantages / (_batch_std(advantages, member) + STD_EPSILON)


def _differences(rewards: Tensor, member: Tensor, baseline: Baseline, lengths: Tensor | None) -> Tensor:
    """Return the difference of each reward to its baseline, `[N]`; 0 where those that it compares are equal."""
    compared = torch.zeros_like(member) if baseline == "batch" else member
    size, zeros = _group_sum(torch.ones_like(rewards), compared), torch.zeros_like(rewards)
    largest = zeros.scatter_reduce(0, compared, rewards, "amax", include_self=False)[compared]
    smallest = zeros.scatter_reduce(0, compared, rewards, "amin", include_self=False)[compared]
    if baseline == "optimal":
        if lengths is None or lengths.shape != rewards.shape:
            raise ValueError("the optimal baseline needs the length of every completion: pass lengths [N]")
        lengths = lengths.to(rewards.dtype)
        centred = rewards - _group_sum(lengths * rewards, member) / _group_sum(lengths, member).clamp(min=1)
    else:
        centred = rewards - _group_sum(rewards, compared) / size
    centred = torch.where(largest - smallest > REWARD_TOLERANCE, centred, 0.0)
    # r - mean of the others = G / (G - 1) (r - mean of all).
    return centred * (size / (size - 1).clamp(min=1)) if baseline == "leave_one_out" else centred


def _correction(member: Tensor) -> Tensor:
    """Return `n / (n - 1)` of each element's group relative to that of the mean size, `[N]`; 1 where all are equal."""
    sizes = torch.bincount(member).double()
    size, mean = sizes[member], sizes.mean()
    return (size * (mean - 1)) / ((size - 1).clamp(min=1) * mean)


def _batch_std(values: Tensor, member: Tensor) -> Tensor:
    """Return the unbiased standard deviation of `[N]` values, over which all groups count alike; scalar."""
    size = _group_sum(torch.ones_like(values), member)
    shares = len(values) / (int(member.max()) + 1) / size
    deviation = values - (shares * values).mean()
    return torch.sqrt((shares * deviation**2).sum() / (len(values) - 1))


def _group_std(rewards: Tensor, member: Tensor) -> Tensor:
    """Return the unbiased standard deviation of each element's group, `[N]`."""
    size = _group_sum(torch.ones_like(rewards), member)
    deviation = rewards - _group_sum(rewards, member) / size
    return torch.sqrt(_group_sum(deviation**2, member) / (size - 1).clamp(min=1))


def _group_sum(values: Tensor, member: Tensor) -> Tensor:
    """Return the sum over each element's group, `[N]`."""
    return torch.zeros_like(values).index_add(0, member, values)[member]
