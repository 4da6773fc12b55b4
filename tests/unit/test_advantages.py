"""Group-relative advantages against numbers worked by hand and a loop over groups."""

from __future__ import annotations

import statistics

import pytest
import torch

from app.objective.advantages import decoupled_advantages, group_advantages
from datamodules.errors import UserError
from datamodules.types import REWARD_TOLERANCE


def test_by_hand() -> None:
    # Group 7: rewards 1, 0, 0: mean 1/3, deviations 2/3, -1/3, -1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3.
    # Group 2: rewards 1, 1, 0, 0: mean 1/2, deviations +-1/2, unbiased variance 4 (1/4) / 3 = 1/3 as well.
    # The mean size is 7/2: differences are multiplied by 3/2 x 5/7 and 4/3 x 5/7, and the completions of a group count
    # 7/6 and 7/8 times. All seven: mean of the groups' means 5/12, and the weighted variance is
    # (7/6 (7^2 + 2 x 5^2) + 7/8 (2 x 7^2 + 2 x 5^2)) / 12^2 / 6 = 245/864.
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    groups = torch.tensor([7, 2, 2, 2, 7, 7, 2])
    centred = torch.tensor([2 / 3, 1 / 2, -1 / 2, 1 / 2, -1 / 3, -1 / 3, -1 / 2], dtype=torch.float64)
    centred *= torch.where(groups == 7, 15 / 14, 20 / 21)
    torch.testing.assert_close(group_advantages(rewards, groups, "none"), centred)
    torch.testing.assert_close(group_advantages(rewards, groups, "group"), centred / ((1 / 3) ** 0.5 + 1e-6))
    torch.testing.assert_close(group_advantages(rewards, groups, "batch"), centred / ((245 / 864) ** 0.5 + 1e-6))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equals_a_loop_over_groups(scale: str) -> None:
    generator = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 12, (60,), generator=generator)
    rewards = torch.rand(60, generator=generator, dtype=torch.float64)
    scored = list(zip(rewards.tolist(), groups.tolist(), strict=True))
    of = {group: [r for r, g in scored if g == group] for group in set(groups.tolist())}
    mean_size, mean = 60 / len(of), statistics.fmean(map(statistics.fmean, of.values()))
    spread = sum(statistics.fmean((r - mean) ** 2 for r in mates) for mates in of.values()) * mean_size / 59
    expected = []
    for reward, group in scored:
        mates, size = of[group], len(of[group])
        divisor = {"group": statistics.stdev(mates) + 1e-6, "batch": spread**0.5 + 1e-6, "none": 1.0}[scale]
        weight = size / (size - 1) * (mean_size - 1) / mean_size
        expected.append((reward - statistics.fmean(mates)) * weight / divisor)
    actual = group_advantages(rewards, groups, scale)  # type: ignore[arg-type]
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_teaches_nothing_is_exactly_zero(scale: str, dtype: torch.dtype) -> None:
    # 0.1 cannot be written in binary, and the mean of seven of them is not 0.1; the group of one has no deviation; the
    # third group's rewards differ by less than the tolerance.
    rewards = torch.tensor([0.1] * 7 + [0.7] + [0.3, 0.3 + 5e-7] + [0.0, 1.0], dtype=dtype)
    groups = torch.tensor([0] * 7 + [1] + [2, 2] + [3, 3])
    advantages = group_advantages(rewards, groups, scale)  # type: ignore[arg-type]
    assert advantages[:10].tolist() == [0.0] * 10
    assert advantages[10] < 0 < advantages[11]


def test_one_completion_and_none() -> None:
    for scale in ("group", "batch", "none"):
        assert group_advantages(torch.tensor([1.0]), torch.tensor([0]), scale).tolist() == [0.0]
        assert group_advantages(torch.tensor([]), torch.tensor([], dtype=torch.int64), scale).tolist() == []


def test_integer_rewards() -> None:
    # One right of two: deviations +-1/2, unbiased std sqrt(1/2).
    advantages = group_advantages(torch.tensor([1, 0]), torch.tensor([0, 0]))
    torch.testing.assert_close(advantages, torch.tensor([0.5, -0.5]) / 0.5**0.5, rtol=2e-6, atol=0)
    assert advantages.dtype == torch.float32


def test_wrong_input_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"scale is 'grup'; expected one of group, batch, batch_centred, none: did you mean 'group'\?"
    ):
        group_advantages(torch.zeros(2), torch.zeros(2, dtype=torch.int64), "grup")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        group_advantages(torch.zeros(2), torch.zeros(3, dtype=torch.int64))


def test_leave_one_out_by_hand() -> None:
    # 1, 0, 0 minus the mean of the others: 1 - 0, 0 - 1/2, 0 - 1/2; a group of one and an equal group stay 0.
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.7, 0.1, 0.1], dtype=torch.float64)
    groups = torch.tensor([0, 0, 0, 1, 2, 2])
    found = group_advantages(rewards, groups, "none", "leave_one_out")
    torch.testing.assert_close(found, torch.tensor([1.0, -0.5, -0.5, 0, 0, 0], dtype=torch.float64))
    # The spread that divides is the group's own, sqrt(1/3), not that of the enlarged differences.
    found = group_advantages(rewards, groups, "group", "leave_one_out")
    assert found[0].item() == pytest.approx(1 / ((1 / 3) ** 0.5 + 1e-6))


def test_rewards_normalised_apart_by_hand() -> None:
    # Two groups of two. Correctness differs in the first only, brevity (a hundredth as large) in the second only; a
    # pair's deviations over its unbiased spread are +-1/sqrt(2) for any size.
    components = torch.tensor([[1.0, 0.02], [0.0, 0.02], [0.0, 0.01], [0.0, 0.02]], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([1.0, 0.5])
    apart = decoupled_advantages(components, weights, groups, "group")
    half = 0.5**0.5
    torch.testing.assert_close(
        apart, torch.tensor([half, -half, -half / 2, half / 2], dtype=torch.float64), rtol=2e-4, atol=0
    )
    # The batch's unbiased deviation of these four: sqrt((2 (1/2) + 2 (1/8)) / 3) = sqrt(5/12).
    whole = decoupled_advantages(components, weights, groups, "batch")
    torch.testing.assert_close(whole, apart / (5 / 12) ** 0.5, rtol=2e-4, atol=0)


def test_a_reward_that_does_not_apply_takes_no_part() -> None:
    nan = float("nan")
    components = torch.tensor([[1.0, nan], [0.0, 1.0], [0.5, 0.0], [0.5, nan]], dtype=torch.float64)
    groups = torch.zeros(4, dtype=torch.int64)
    found = decoupled_advantages(components, torch.tensor([1.0, 1.0]), groups, "group")
    first = group_advantages(components[:, 0], groups)
    second = group_advantages(components[1:3, 1], groups[:2])
    torch.testing.assert_close(found, first + torch.cat([torch.zeros(1), second, torch.zeros(1)]))
    assert not torch.isnan(found).any()


def test_equal_components_are_exactly_zero() -> None:
    components = torch.tensor([[0.1, 0.3]] * 7 + [[0.0, 1.0], [1.0, 0.0]])
    groups = torch.tensor([0] * 7 + [1, 1])
    found = decoupled_advantages(components, torch.tensor([1.0, 2.0]), groups, "batch")
    assert found[:7].tolist() == [0.0] * 7
    # Their sums are equal with equal weights, and a sum would teach nothing; apart they do.
    assert found[7] > 0 > found[8]


def test_wrong_components_are_refused() -> None:
    zeros, groups = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match=r"advantage_scale is 'none'.*would normalise nothing"):
        decoupled_advantages(zeros, torch.ones(2), groups, "none")
    shapes = r"components \(2, 2\), reward_weights \(3,\), groups \(2,\): expected \[N, R\], \[R\] and \[N\]"
    with pytest.raises(ValueError, match=shapes):
        decoupled_advantages(zeros, torch.ones(3), groups)
    with pytest.raises(UserError, match=r"^scale is 'grup'.*did you mean 'group'\?"):
        decoupled_advantages(zeros, torch.ones(2), groups, "grup")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"baseline is 'leave-one-out'.*did you mean 'leave_one_out'\?"):
        group_advantages(torch.zeros(2), groups, "none", "leave-one-out")  # type: ignore[arg-type]


def test_equal_negative_rewards_are_exactly_zero() -> None:
    # The mean of seven times -0.1 is not -0.1 either.
    rewards = torch.tensor([-0.1] * 7 + [-1.0, -2.0])
    advantages = group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]))
    assert advantages[:7].tolist() == [0.0] * 7
    assert advantages[7] > 0 > advantages[8]


def test_rewards_as_far_apart_as_the_tolerance_are_equal() -> None:
    rewards = torch.tensor([0.0, REWARD_TOLERANCE, 0.0, 2 * REWARD_TOLERANCE], dtype=torch.float64)
    advantages = group_advantages(rewards, torch.tensor([0, 0, 1, 1]), "none")
    torch.testing.assert_close(advantages, torch.tensor([0, 0, -1e-6, 1e-6], dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_pair_is_compared_with_one_another() -> None:
    # Each is the other's baseline: 1 - 0 and 0 - 1.
    pair, together = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([3, 3])
    assert group_advantages(pair, together, "none", "leave_one_out").tolist() == [1, -1]
    # A batch of two: deviations +-1/2 over the unbiased deviation sqrt(1/2).
    halves = torch.tensor([0.5, -0.5], dtype=torch.float64) / (0.5**0.5 + 1e-6)
    torch.testing.assert_close(group_advantages(pair, together, "batch"), halves)


def test_rewards_in_half_precision_are_compared_in_float32() -> None:
    rewards, groups = torch.tensor([0.1, 0.7, 0.2, 0.9]).bfloat16(), torch.zeros(4, dtype=torch.int64)
    advantages = group_advantages(rewards, groups, "none")
    values = rewards.tolist()
    expected = torch.tensor([value - statistics.fmean(values) for value in values])
    torch.testing.assert_close(advantages, expected, rtol=1e-6, atol=1e-7)
    assert group_advantages(torch.tensor([], dtype=torch.int64), groups[:0]).dtype == torch.float32


def test_rewards_apart_with_the_others_as_the_baseline() -> None:
    # 1, 0, 0 minus the mean of the others is 1, -1/2, -1/2; the spread that divides is sqrt(1/3).
    components = torch.tensor([[1.0], [0.0], [0.0]], dtype=torch.float64)
    found = decoupled_advantages(components, torch.tensor([2.0]), torch.zeros(3), "group", "leave_one_out")
    spread = (1 / 3) ** 0.5 + 1e-6
    torch.testing.assert_close(found, torch.tensor([2 / spread, -1 / spread, -1 / spread], dtype=torch.float64))


def test_rewards_apart_of_the_smallest_batches() -> None:
    one, weight = torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([3.0])
    assert decoupled_advantages(one, weight, torch.tensor([0]), "batch").tolist() == [0]
    # Of two: +-3 / sqrt(2) each, whose unbiased deviation is 3.
    two = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    found = decoupled_advantages(two, weight, torch.tensor([0, 0]), "batch")
    torch.testing.assert_close(found, torch.tensor([0.5**0.5, -(0.5**0.5)], dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_batch_as_the_baseline_by_hand() -> None:
    # The mean of all is 1/2, and the standard deviation sqrt(4 (1/4) / 3).
    rewards, groups = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1])
    centred = torch.tensor([0.5, 0.5, -0.5, -0.5])
    torch.testing.assert_close(group_advantages(rewards, groups, "none", "batch"), centred)
    torch.testing.assert_close(group_advantages(rewards, groups, "batch", "batch"), centred / ((1 / 3) ** 0.5 + 1e-6))
    assert group_advantages(torch.ones(3), groups[:3], "batch", "batch").tolist() == [0.0] * 3
    with pytest.raises(UserError, match=r"the standard deviation of their group, which is 0.*Set advantage_scale"):
        group_advantages(rewards, groups, "group", "batch")


def test_the_spread_of_what_is_centred_by_hand() -> None:
    # Differences +-1/2 and 0, 0 have the mean 0 and the variance (1/4 + 1/4) / 3.
    rewards, groups = torch.tensor([1.0, 0.0, 5.0, 5.0]), torch.tensor([0, 0, 1, 1])
    found = group_advantages(rewards, groups, "batch_centred")
    torch.testing.assert_close(found, torch.tensor([0.5, -0.5, 0.0, 0.0]) / ((1 / 6) ** 0.5 + 1e-6))


def test_the_mean_weighted_by_length_by_hand() -> None:
    # (3 x 1 + 1 x 0) / 4 = 3/4, and (1 x 2 + 1 x 0) / 2 = 1.
    rewards, groups = torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1])
    lengths = torch.tensor([3.0, 1.0, 1.0, 1.0])
    found = group_advantages(rewards, groups, "none", "optimal", lengths)
    torch.testing.assert_close(found, torch.tensor([0.25, -0.75, 1.0, -1.0]))
    with pytest.raises(ValueError, match="needs the length of every completion"):
        group_advantages(rewards, groups, "none", "optimal")


def test_one_reward_normalised_apart_is_that_reward_also_for_unlike_sizes() -> None:
    generator = torch.Generator().manual_seed(5)
    rewards, groups = torch.rand(9, generator=generator), torch.tensor([4, 1, 1, 4, 4, 4, 1, 7, 7])
    for scale in ("group", "batch_centred"):
        found = decoupled_advantages(rewards[:, None], torch.ones(1), groups, scale)  # type: ignore[arg-type]
        expected = group_advantages(rewards, groups, "group")
        if scale == "batch_centred":  # whose deviation counts groups alike: 3 / n for groups of 4, 3 and 2
            shares = torch.tensor([3 / 4, 1, 1, 3 / 4, 3 / 4, 3 / 4, 1, 3 / 2, 3 / 2])
            expected = expected / ((shares * expected**2).sum() / 8) ** 0.5
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
