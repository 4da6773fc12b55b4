"""Borders of the selectors that no larger test notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from datamodules.selectors import Dps, Mopps, Pools, Posterior, SelectionContext
from datamodules.selectors.greso import ZeroVarianceSkip
from datamodules.selectors.sampling import gumbel, pass_ranks
from datamodules.types import REWARD_TOLERANCE
from tests.support.selector_builders import PLAIN, chosen, outcomes, pool_of, random_embeddings, ready


def test_a_shuffled_pass_is_shared_and_therefore_read_only() -> None:
    ranks = pass_ranks(0, "of this test", 0, 5)
    with pytest.raises(ValueError, match="read-only"):
        ranks[0] = 1
    assert sorted(pass_ranks(0, "of this test", 0, 5).tolist()) == [0, 1, 2, 3, 4]


def test_constants_are_refitted_when_the_outcomes_have_doubled() -> None:
    one = Posterior(use_embeddings=False)
    one.setup(pool_of([str(i) for i in range(40)]), SelectionContext(7))
    fitted = []
    for count in (3, 2, 1, 5, 1):  # 3, 5, 6, 11 and 12 outcomes in all
        one.choose(count)
        one.observe(outcomes(range(count), np.linspace(0.25, 0.75, count)))
        fitted.append(one.state_dict()["fitted_at"])
    assert fitted == [3, 3, 6, 6, 12]


def test_time_advances_by_one_with_every_step() -> None:
    one = Posterior(use_embeddings=False)
    one.setup(pool_of([str(i) for i in range(20)]), SelectionContext(7))
    for step in range(1, 5):
        one.choose(2)
        one.choose(2, refill=True)
        if step != 2:  # a step without outcomes passes too
            one.observe(outcomes(range(step), [0.5] * step))
        assert one.state_dict()["model"]["step"] == step


def test_every_transition_begins_with_the_prior_count() -> None:
    counts = ready(Dps(prior=2.0), 5).state_dict()["counts"]
    assert counts.shape == (3, 3, 5)
    assert set(counts.unique().tolist()) == {2.0}


def test_constants_are_fitted_from_the_first_outcome_on() -> None:
    one = ready(Posterior(use_embeddings=False), 8)
    assert one.state_dict()["fitted_at"] == 0
    one.choose(1)
    one.observe(outcomes([3], [0.5]))
    assert one.state_dict()["fitted_at"] == 1


def test_pools_may_reach_from_zero_to_one() -> None:
    everything = ready(Pools(hard_up_to=0.0, normal_up_to=1.0, hard=0, normal=1, easy=0, unseen=0), 4)
    everything.choose(1)
    everything.observe(outcomes(range(4), [0.0, 0.5, 1.0, 1.0]))
    assert sorted(chosen(everything, 3).tolist()) == [1, 2, 3]  # bounds belong to the pool below them
    nothing = ready(Pools(hard_up_to=0.5, normal_up_to=0.5), 4)
    assert len(nothing.choose(2)) == 2


@pytest.mark.parametrize(
    ("rate", "run"), [(REWARD_TOLERANCE, -1), (1 - REWARD_TOLERANCE, 1), (2 * REWARD_TOLERANCE, 0)]
)
def test_rates_at_the_tolerance_count_as_all_or_nothing(rate: float, run: int) -> None:
    one = ZeroVarianceSkip()
    one.setup(pool_of(["a", "b", "c"]), SelectionContext(0))
    one.learn(np.array([1]), outcomes([1], [rate]))
    assert one.state_dict()["run"].tolist() == [0, run, 0]


RANKERS = {name: make for name, make in PLAIN.items() if name != "Greso"}  # whose filter draws too


@pytest.mark.parametrize("make", RANKERS.values(), ids=RANKERS)
def test_draws_and_steps_are_counted_one_by_one(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    random_embeddings(monkeypatch, 12, 4)
    one = make()
    one.setup(pool_of([str(i) for i in range(12)]), SelectionContext(7, "an encoder"))
    for step in range(1, 4):
        one.choose(2)
        one.choose(1, refill=True)
        one.choose_references(3)
        assert (one.state_dict()["draws"], one.state_dict()["steps"]) == (3 * step, step)
        assert len(one.state_dict()["chosen_now"]) == 3


def test_the_explored_share_is_that_of_the_step() -> None:
    one = ready(Posterior(use_embeddings=False), 20)
    for _ in range(3):
        one.choose(4)
        assert one.state_dict()["explored"][1] == 4
        one.choose(2, refill=True)
        assert one.state_dict()["explored"][1] == 6


def test_noise_is_gumbels() -> None:
    noise = gumbel(np.full(20_000, 5.0), np.random.default_rng(0)) - 5.0
    # The distribution function is exp(-exp(-x)), the mean Euler's constant.
    assert np.mean(noise <= 0) == pytest.approx(np.exp(-1), abs=0.01)
    assert np.mean(noise <= 1) == pytest.approx(np.exp(-np.exp(-1)), abs=0.01)
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=0.03)


def test_mopps_looks_at_sixteen_times_as_many_prompts_as_it_chooses() -> None:
    assert Mopps().candidates == 16
