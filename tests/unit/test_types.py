"""Groups, batches and seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest

from datamodules.seeding import derive_seed, sample_seeds
from datamodules.types import Outcomes, TrainBatch
from tests.support.builders import group, prompt


@pytest.mark.parametrize(
    ("rewards", "teaches"),
    [([0, 0, 0], False), ([1, 1], False), ([0, 1], True), ([0.3, 0.3 + 5e-7], False), ([1], False), ([], False)],
)
def test_a_group_teaches_when_its_rewards_differ(rewards, teaches):
    assert group(prompt(0), rewards).informative is teaches


def test_an_empty_group_has_no_success_rate_and_no_outcome():
    empty = group(prompt(0), [])
    assert math.isnan(empty.success_rate)
    outcomes = Outcomes.of([empty, group(prompt(1), [0, 1, 1, 1])], 3, "fresh")
    assert outcomes.prompt_ids == ["p1"]
    assert outcomes.success_rate.tolist() == [0.75]
    assert outcomes.samples.tolist() == [4]
    # Population standard deviation of 0, 1, 1, 1: sqrt(3/16).
    assert outcomes.reward_std.tolist() == pytest.approx([math.sqrt(3 / 16)])


def test_a_batch_keeps_the_order_of_its_groups_within_every_fate():
    batch, groups = TrainBatch(0, ()), [group(prompt(index), [0, 1]) for index in range(6)]
    batch.add(groups[:4])
    batch.add(groups[4:], "surplus")
    batch.move([groups[2], groups[0]], "dropped")
    batch.move([groups[5]], "trained")
    batch.move([groups[0]], "surplus")
    assert batch.groups == [groups[1], groups[3], groups[5]]
    assert batch.of("dropped", "surplus") == [groups[2], groups[4], groups[0]]
    batch.groups.clear()
    assert len(batch.rollouts) == 6


def test_seeds_differ_by_every_part_of_their_context():
    contexts = [(0, "train", 1, "p", 0), (1, "train", 1, "p", 0), (0, "val", 1, "p", 0), (0, "train", 2, "p", 0)]
    contexts += [(0, "train", 1, "q", 0), (0, "train", 1, "p", 1), (0, "train", "1", "p", 0), (0, "train1", "p", 0)]
    seeds = {derive_seed(*context) for context in contexts}
    assert len(seeds) == len(contexts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_sample_keeps_its_seed_in_any_batch():
    alone = sample_seeds(7, "train", 3, ["b"], 4)
    together = sample_seeds(7, "train", 3, ["a", "b", "c"], 4)
    np.testing.assert_array_equal(together[1], alone[0])
    assert len(np.unique(together)) == 12
