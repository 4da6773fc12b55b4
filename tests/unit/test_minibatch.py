"""Mini-batches: what is left out, what stays in the denominators, and who goes where."""

from __future__ import annotations

import numpy as np
import pytest

from app.minibatch import advantages_of, minibatches
from datamodules.seeding import generator
from tests.unit.builders import group, prompt


def make(groups, *, parts=1, aggregation="token", keep=False):
    return minibatches(
        groups,
        advantages_of(groups, "group"),
        parts=parts,
        generator=generator(0, "minibatches", 0),
        aggregation=aggregation,
        max_completion_length=10,
        keep_zero_advantage=keep,
    )


def test_advantages_are_relative_to_each_group():
    first, second = advantages_of([group(prompt(0), [0, 1]), group(prompt(1), [1, 1, 1])], "group")
    # Mean 1/2 and unbiased standard deviation sqrt(1/2): +-(1/2) / 0.70711 = +-0.70711.
    np.testing.assert_allclose(first, [-0.70711, 0.70711], atol=2e-5)
    np.testing.assert_array_equal(second, [0, 0, 0])


def test_equal_rewards_are_left_out_but_counted():
    # Completion lengths follow the position in the group: 1, 2, 3, 1, ... tokens.
    (part,) = make([group(prompt(0), [0, 1]), group(prompt(1), [1, 1, 1])])
    assert part.tokens == (1 + 2) + (1 + 2 + 3)
    assert part.skipped_tokens == 6
    assert [len(sequence.completion_ids) for sequence in part.sequences] == [1, 2]
    assert all(sequence.weight == pytest.approx(1 / 9) for sequence in part.sequences)


def test_a_kl_term_keeps_every_completion():
    (part,) = make([group(prompt(0), [0, 1]), group(prompt(1), [1, 1, 1])], keep=True)
    assert (len(part.sequences), part.skipped_tokens) == (5, 0)


def test_every_group_goes_whole_into_one_mini_batch():
    parts = make([group(prompt(index), [0, 1, 0]) for index in range(6)], parts=3)
    homes = [{sequence.prompt_ids for sequence in part.sequences} for part in parts]
    assert [len(home) for home in homes] == [2, 2, 2]
    assert set.union(*homes) == {(1, 2, 3 + index) for index in range(6)}
    # Two groups of 1 + 2 + 3 tokens: each token of a mini-batch weighs 1/12.
    weights = {sequence.weight for part in parts for sequence in part.sequences}
    assert [pytest.approx(1 / 12)] == list(weights)
