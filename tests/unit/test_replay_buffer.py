"""The replay buffer against a plain list, and its passage through a checkpoint."""

from __future__ import annotations

import io

import numpy as np
import torch

from callbacks.group_codec import pack_groups, unpack_groups
from callbacks.replay_buffer import ReplayBuffer
from datamodules.seeding import generator
from tests.unit.builders import group, pool, prompt


def test_oldest_groups_leave_first_and_a_prompt_keeps_its_newest():
    buffer = ReplayBuffer(3)
    buffer.insert(group(prompt(index), [0, 1], birth=index) for index in range(3))
    buffer.insert([group(prompt(1), [1, 0], birth=7)])
    assert [(one.prompt.id, one.birth_step) for one in buffer.groups] == [("p0", 0), ("p2", 2), ("p1", 7)]
    buffer.insert([group(prompt(8), [0, 1], birth=8), group(prompt(9), [0, 1], birth=9)])
    assert [one.prompt.id for one in buffer.groups] == ["p1", "p8", "p9"]


def test_draws_are_uniform_without_replacement_and_leave_the_buffer_as_it_is():
    buffer = ReplayBuffer(6)
    buffer.insert(group(prompt(index), [0, 1]) for index in range(6))
    drawn = np.zeros(6)
    draws = 3000
    for step in range(draws):
        chosen = [int(one.prompt.id[1:]) for one in buffer.draw(2, generator(0, "replay", step))]
        assert len(set(chosen)) == 2
        drawn[chosen] += 1
    # Each prompt is in a draw of 2 out of 6 with probability 1/3: sd of its share = sqrt(1/3 * 2/3 / 3000) = 0.0086.
    assert np.abs(drawn / draws - 1 / 3).max() < 4 * 0.0086
    assert len(buffer) == 6
    assert len(buffer.draw(10, generator(0, "replay", 0))) == 6


def test_a_draw_depends_on_its_generator_alone():
    buffer = ReplayBuffer(9)
    buffer.insert(group(prompt(index), [0, 1]) for index in range(9))
    first, again, other = (
        [one.prompt.id for one in buffer.draw(4, generator(seed, "replay", 5))] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_checkpoint_gives_back_every_value():
    stored = [group(prompt(2), [0, 1, 1], birth=3, source="reference"), group(prompt(0), [0.25, 1], birth=4)]
    buffer = ReplayBuffer(5)
    buffer.insert(stored)
    written = io.BytesIO()
    torch.save(buffer.state_dict(), written)
    written.seek(0)
    restored = ReplayBuffer(5)
    restored.load_state_dict(torch.load(written, weights_only=True), pool(4))
    for before, after in zip(stored, restored.groups, strict=True):
        assert (before.prompt.id, before.source, before.birth_step) == (after.prompt.id, after.source, after.birth_step)
        assert after.prompt.token_ids == before.prompt.token_ids
        np.testing.assert_array_equal(before.rewards, after.rewards)
        np.testing.assert_array_equal(before.components["exact"], after.components["exact"])
        for one, other in zip(before.completions, after.completions, strict=True):
            np.testing.assert_array_equal(one.token_ids, other.token_ids)
            np.testing.assert_array_equal(one.logprobs, other.logprobs)
            assert (one.text, one.finish_reason, one.policy_version) == (
                other.text,
                other.finish_reason,
                other.policy_version,
            )
            assert other.token_ids.dtype == np.int32
            assert other.logprobs.dtype == np.float32


def test_nothing_packs_to_nothing():
    assert unpack_groups(pack_groups([]), pool(1)) == []
