"""Mini-batches: what is left out, what stays in the denominators, and who goes where."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from app.update.minibatch import advantages_of, minibatches
from datamodules.seeding import generator
from tests.support.builders import group, prompt


def make(groups, *, parts=1, aggregation="token", keep=False, mask=False):
    return minibatches(
        groups,
        advantages_of(groups, "group"),
        parts=parts,
        generator=generator(0, "minibatches", 0),
        aggregation=aggregation,
        max_completion_length=10,
        keep_zero_advantage=keep,
        mask_truncated=mask,
    )


def test_advantages_are_relative_to_each_group():
    first, second = advantages_of([group(prompt(0), [0, 1]), group(prompt(1), [1, 1, 1])], "group")
    # Mean 1/2 and unbiased standard deviation sqrt(1/2): +-(1/2) / 0.70711 = +-0.70711. Of a pair the mean takes 1/2
    # away, of a group of the mean size 5/2 only 2/5: times 2 x 3/5.
    np.testing.assert_allclose(first, [-0.84853, 0.84853], atol=2e-5)
    np.testing.assert_array_equal(second, [0, 0, 0])


def test_equal_rewards_are_left_out_but_counted():
    # Completion lengths follow the position in the group: 1, 2, 3, 1, ... tokens.
    (part,) = make([group(prompt(0), [0, 1]), group(prompt(1), [1, 1, 1])])
    assert part.tokens == (1 + 2) + (1 + 2 + 3)
    assert part.skipped_tokens == 6
    assert [len(sequence.completion_ids) for sequence in part.sequences] == [1, 2]
    # The groups count alike: 3 tokens of a pair and 6 of three completions are 3/2 and 2 tokens per completion.
    assert all(sequence.weight == pytest.approx(1 / 2 / (3 / 2 + 2)) for sequence in part.sequences)


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


@pytest.mark.parametrize("seed", range(5))
def test_groups_with_an_advantage_are_dealt_evenly(seed):
    informative = {1, 4, 5, 9, 10}
    groups = [group(prompt(index), [0, int(index in informative)]) for index in range(12)]
    advantages = advantages_of(groups, "group")
    parts = minibatches(
        groups,
        advantages,
        parts=3,
        generator=generator(seed, "minibatches", 0),
        aggregation="token",
        max_completion_length=10,
        keep_zero_advantage=True,
    )
    homes = [{name.prompt_id for name in part.ids} for part in parts]
    assert [len(home) for home in homes] == [4, 4, 4]
    taught = {groups[index].prompt.id for index in informative}
    assert sorted(len(home & taught) for home in homes) == [1, 2, 2]


def test_every_group_may_come_first():
    first = set()
    for seed in range(40):
        parts = minibatches(
            groups := [group(prompt(index), [0, 1]) for index in range(4)],
            advantages_of(groups, "group"),
            parts=2,
            generator=generator(seed, "minibatches", 0),
            aggregation="token",
            max_completion_length=10,
            keep_zero_advantage=False,
        )
        first |= {frozenset(name.prompt_id for name in parts[0].ids)}
    assert len(first) == 6  # all pairs of four


def test_completions_are_named_as_in_the_files_of_completions():
    (part,) = make([group(prompt(0), [1, 1, 1]), group(prompt(1, "x/7"), [0, 0, 1])])
    assert [str(one) for one in part.ids] == ["x/7[0]", "x/7[1]", "x/7[2]"]
    assert len(part.sequences) == 3


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        # Lengths 1, 2, 3, 1; the second and the third were cut.
        ("token", [1 / 2, 1 / 2]),
        ("sequence", [1 / 2, 1 / 2]),
        ("constant", [1 / 20, 1 / 20]),
    ],
)
def test_cut_completions_count_nothing_in_the_loss(aggregation, weights):
    one = group(prompt(0), [0, 1, 1, 1])
    cut = tuple(
        dataclasses.replace(completion, finish_reason="length") if index in (1, 2) else completion
        for index, completion in enumerate(one.completions)
    )
    one = dataclasses.replace(one, completions=cut)
    (part,) = make([one], aggregation=aggregation, mask=True)
    assert part.tokens == 2
    assert [sequence.weight for sequence in part.sequences] == pytest.approx(weights)
    # Their rewards still make the baseline: mean 3/4, deviation 1/2.
    assert [sequence.advantage for sequence in part.sequences] == pytest.approx([-1.5, 0.5], rel=1e-5)
    assert make([one], aggregation=aggregation)[0].tokens == 7


def test_rewards_apart_use_the_weights_by_name():
    one = group(prompt(0), [0.0, 1.0, 1.0])
    one = dataclasses.replace(
        one, components={"a": np.float32([0, 1, 2]), "b": np.float32([1, 1, 1]), "unused": np.float32([9, 0, 0])}
    )
    (found,) = advantages_of([one], "group", decoupled={"b": 3.0, "a": 2.0})
    np.testing.assert_allclose(found, [-2, 0, 2], rtol=1e-5)
