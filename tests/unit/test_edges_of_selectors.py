"""Borders of the selectors that no larger test notices."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.selectors import Dps, Posterior, SelectionContext
from datamodules.selectors.sampling import pass_ranks
from tests.support.selector_builders import outcomes, pool_of, ready


def test_a_shuffled_pass_is_shared_and_therefore_read_only() -> None:
    ranks = pass_ranks(0, "Uniform", 0, 5)
    with pytest.raises(ValueError, match="read-only"):
        ranks[0] = 1
    assert sorted(pass_ranks(0, "Uniform", 0, 5).tolist()) == [0, 1, 2, 3, 4]


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
