"""MoPPS: the posterior by hand, the distribution of the Thompson draw and the window over the shuffled pool."""

import math

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.seeding import generator
from datamodules.selectors import Mopps
from datamodules.types import Outcomes
from tests.support.selector_builders import chosen, outcomes, ready


def test_the_posterior_by_hand():
    mopps = ready(Mopps(decay=0.5, prior_successes=2, prior_failures=1), 4)
    assert mopps.forecast().tolist() == [2 / 3] * 4
    mopps.observe(outcomes([1, 2], [0.25, 1.0]))  # of 8 each
    # a = 0.5 * 2 + 0.5 * 2 + 2 = 4, b = 0.5 + 0.5 + 6 = 7; a = 2 + 8, b = 1
    np.testing.assert_allclose(mopps.forecast(), [2 / 3, 4 / 11, 10 / 11, 2 / 3])
    mopps.observe(Outcomes(1, ["p1"], np.array([0.5]), np.array([4]), "reference", np.array([0.5])))
    # a = 0.5 * 4 + 0.5 * 2 + 2 = 5, b = 0.5 * 7 + 0.5 * 1 + 2 = 6; the others keep theirs
    np.testing.assert_allclose(mopps.forecast(), [2 / 3, 5 / 11, 10 / 11, 2 / 3])
    std = [math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) for a, b in ((2, 1), (5, 6), (10, 1), (2, 1))]
    assert mopps.metrics()["selection/posterior_mean"] == pytest.approx(np.mean([2 / 3, 5 / 11, 10 / 11, 2 / 3]))
    assert mopps.metrics()["selection/posterior_std"] == pytest.approx(np.mean(std))


def test_without_decay_every_completion_counts():
    mopps = ready(Mopps(), 3)
    for rate in (0.0, 0.5, 0.25):
        mopps.observe(outcomes([0], [rate]))
    assert mopps.forecast()[0] == pytest.approx((1 + 0 + 4 + 2) / (2 + 24))


def beta_cdf(a, b, at):
    grid = np.linspace(0, at, 20001)
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    norm = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    return float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(grid)) / norm)


def test_the_thompson_draw_has_the_posterior_distribution():
    """Priority -|theta - target| under Beta(3, 7) and Beta(9, 1), against the integral of the density."""
    mopps = ready(Mopps(target=0.4), 2)
    mopps.observe(outcomes([0, 1], [0.25, 1.0]))
    draws, rng = 20000, np.random.default_rng(0)
    found = -np.array([mopps.priorities(1, rng) for _ in range(draws)])
    for position, (a, b) in enumerate(((3, 7), (9, 1))):
        for distance in (0.05, 0.1, 0.2, 0.35, 0.5):
            expected = beta_cdf(a, b, min(0.4 + distance, 1.0)) - beta_cdf(a, b, max(0.4 - distance, 0.0))
            share = np.mean(found[:, position] <= distance)
            assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws) + 1e-6


def test_it_takes_the_nearest_to_the_target_when_the_posterior_is_sharp():
    mopps = ready(Mopps(target=0.5, candidates=0), 100)
    rates = np.random.default_rng(0).permutation(100) / 99
    for _ in range(4000):
        mopps.learn(np.arange(100), outcomes(range(100), rates))
    nearest = np.argsort(np.abs(rates - 0.5))
    assert set(chosen(mopps, 6)) <= set(nearest[:8])


def test_candidates_are_the_next_of_the_shuffled_passes():
    size, n, multiple = 30, 3, 4
    mopps = ready(Mopps(candidates=multiple), size, seed=11)
    row = np.concatenate([generator(11, "Mopps", "pass", number).permutation(size) for number in range(5)])
    seen = set()
    for visit in range(10):
        window = row[visit * n * multiple : (visit + 1) * n * multiple]
        taken = chosen(mopps, n)
        assert set(taken) <= set(window)
        seen |= set(taken)
    assert len(seen) > 15
    narrow = ready(Mopps(candidates=1), size, seed=11)
    assert [sorted(chosen(narrow, 3)) for _ in range(10)] == [sorted(row[i : i + 3]) for i in range(0, 30, 3)]


def test_what_follows_the_candidates_fills_up_and_a_refill_moves_on():
    size = 30
    row = generator(11, "Mopps", "pass", 0).permutation(size)
    mopps = ready(Mopps(candidates=2), size, seed=11)
    first = chosen(mopps, 4, exclude=[f"p{i}" for i in row[:7]])
    assert first.tolist() == [row[7], *row[8:11]]  # one candidate is left, then the next in order
    assert set(chosen(mopps, 3, refill=True)) <= set(row[8:14]) - set(first)


def test_wrong_arguments_are_one_line_errors():
    for arguments, message in (
        ({"target": -0.1}, r"target is -0\.1"),
        ({"decay": 1.5}, r"decay is 1\.5"),
        ({"prior_failures": 0.0}, r"prior_failures=0\.0"),
        ({"candidates": -1}, "candidates is -1"),
    ):
        with pytest.raises(UserError, match=message):
            Mopps(**arguments)


def test_a_shaped_correctness_reward_adds_no_more_than_its_completions():
    mopps = ready(Mopps(), 3)
    mopps.observe(outcomes([0, 1], [1.5, -0.5]))  # of 8 each: (a, b) = (1 + 8, 1 + 0) and (1 + 0, 1 + 8)
    np.testing.assert_allclose(mopps.forecast(), [0.9, 0.1, 0.5])
