"""Difficulty pools: classes by hand, and the draw against the enumerated distribution."""

from itertools import permutations

import pytest

from datamodules.errors import UserError
from datamodules.selectors import Pools
from tests.support.selector_builders import chosen, outcomes, ready

RATES = [0.0, 0.25, 0.375, 0.75, 0.875, 1.0]
WEIGHTS = [0.2, 0.2, 1.0, 1.0, 0.2, 0.2, 1.0]  # the seventh prompt was never measured


def test_classes_by_hand():
    pools = ready(Pools(), 7)
    assert pools.metrics()["selection/unseen_fraction"] == 1
    assert pools.forecast() is None
    pools.observe(outcomes(range(6), RATES))
    assert pools.metrics() == pytest.approx(
        {
            "selection/hard_fraction": 2 / 7,
            "selection/normal_fraction": 2 / 7,
            "selection/easy_fraction": 2 / 7,
            "selection/unseen_fraction": 1 / 7,
        }
    )
    pools.observe(outcomes([0], [1.0]))  # the last group alone counts
    assert pools.metrics()["selection/easy_fraction"] == pytest.approx(3 / 7)


def test_draw_frequencies():
    draws = 8000
    pools = ready(Pools(), 7)
    pools.observe(outcomes(range(6), RATES))
    counts: dict[tuple[int, ...], int] = {}
    for _ in range(draws):
        pair = tuple(pools.select(2).tolist())
        counts[pair] = counts.get(pair, 0) + 1
    total = sum(WEIGHTS)
    expected = {
        (i, j): draws * WEIGHTS[i] / total * WEIGHTS[j] / (total - WEIGHTS[i]) for i, j in permutations(range(7), 2)
    }
    chi_square = sum((counts.get(pair, 0) - mean) ** 2 / mean for pair, mean in expected.items())
    assert chi_square < 74.7  # 0.1% point at 41 degrees of freedom


def test_a_weight_of_zero_comes_last_and_never_fails():
    pools = ready(Pools(hard=0.0, easy=0.0), 7)
    pools.observe(outcomes(range(6), RATES))
    for _ in range(50):
        assert set(chosen(pools, 3)) == {2, 3, 6}
        assert {2, 3, 6} < set(chosen(pools, 5))


def test_wrong_arguments_are_one_line_errors():
    with pytest.raises(UserError, match=r"hard_up_to=0\.8 and normal_up_to=0\.75"):
        Pools(hard_up_to=0.8)
    with pytest.raises(UserError, match="at least one above 0"):
        Pools(hard=0, normal=0, easy=0, unseen=0)
    with pytest.raises(UserError, match=r"hard=-0\.1"):
        Pools(hard=-0.1)
