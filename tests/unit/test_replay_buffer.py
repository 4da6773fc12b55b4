"""The replay buffer against a plain list, its draws against exact probabilities, and the memory of its entries."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from app.objective.advantages import group_advantages
from callbacks.algorithm.replay_buffer import ReplayBuffer, draw_weight
from datamodules.group_codec import pack, pack_groups, unpack_groups
from datamodules.seeding import generator
from datamodules.types import REWARD_TOLERANCE, Completion, Outcome, RolloutGroup, Turn
from tests.support.builders import completion, conversation, group, pool, prompt
from tests.support.fuzzing import examples

POOL = pool(7)


def test_oldest_groups_leave_first_and_a_prompt_keeps_its_newest():
    buffer = ReplayBuffer(3)
    buffer.insert(group(prompt(index), [0, 1], birth=index) for index in range(3))
    buffer.insert([group(prompt(1), [1, 0], birth=7)])
    assert [(one.prompt.id, one.birth_step) for one in buffer.groups] == [("p0", 0), ("p2", 2), ("p1", 7)]
    buffer.insert([group(prompt(8), [0, 1], birth=8), group(prompt(9), [0, 1], birth=9)])
    assert [one.prompt.id for one in buffer.groups] == ["p1", "p8", "p9"]


def assert_equal(found: RolloutGroup, expected: RolloutGroup, half: bool = False) -> None:
    """Every field; log-probs as float16 would give them back when `half`."""
    for name in ("source", "birth_step"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.prompt.id == expected.prompt.id
    assert found.prompt.token_ids == expected.prompt.token_ids
    np.testing.assert_array_equal(found.rewards, expected.rewards)
    np.testing.assert_array_equal(found.correctness, expected.correctness)
    assert found.components.keys() == expected.components.keys()
    for name, values in expected.components.items():
        np.testing.assert_array_equal(found.components[name], values)
    for one, other in zip(found.completions, expected.completions, strict=True):
        kept = other.logprobs.astype(np.float16).astype(np.float32) if half else other.logprobs
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, kept)
        assert (one.token_ids.dtype, one.logprobs.dtype) == (np.int32, np.float32)
        assert (one.text, one.finish_reason, one.policy_version) == (
            other.text,
            other.finish_reason,
            other.policy_version,
        )
        assert [asdict(turn) for turn in one.turns] == [asdict(turn) for turn in other.turns]
        assert (one.context is None) == (other.context is None)
        if one.context is not None:
            np.testing.assert_array_equal(one.context, other.context)


def restored(buffer: ReplayBuffer, like: ReplayBuffer) -> ReplayBuffer:
    """Fill `like`, an empty buffer, from a checkpoint of `buffer`, and return it."""
    written = io.BytesIO()
    torch.save(buffer.state_dict(), written)
    written.seek(0)
    like.load_state_dict(torch.load(written, weights_only=True), POOL)
    return like


@st.composite
def completions(draw: Any) -> Completion:
    tokens = draw(st.lists(st.integers(0, 200_000), max_size=4))
    logprobs = draw(st.lists(st.floats(-30, 0, width=32), min_size=len(tokens), max_size=len(tokens)))
    finish, version = draw(st.sampled_from(["stop", "length"])), draw(st.integers(0, 2**40))
    text = draw(st.text(max_size=5))
    return Completion(np.array(tokens, np.int32), np.array(logprobs, np.float32), finish, version, text)


@st.composite
def groups(draw: Any) -> RolloutGroup:
    members = draw(st.lists(completions(), max_size=3))
    values = st.lists(st.sampled_from([0, 0.25, 1]), min_size=len(members), max_size=len(members))
    rewards, correctness = (np.array(draw(values), np.float32) for _ in range(2))
    names = draw(st.sampled_from([(), ("exact",), ("exact", "format")]))
    return RolloutGroup(
        prompt=POOL[draw(st.integers(0, len(POOL) - 1))],
        completions=tuple(members),
        rewards=rewards,
        correctness=correctness,
        components={name: np.array(draw(values), np.float32) for name in names},
        source=draw(st.sampled_from(["fresh", "reference"])),
        birth_step=draw(st.integers(0, 20)),
    )


PROMPTS = st.sets(st.sampled_from(POOL.ids), max_size=3)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), st.lists(groups(), min_size=1, max_size=4)),
        st.tuples(st.just("discard"), PROMPTS),
        st.tuples(st.just("expire"), st.integers(0, 25)),
        st.tuples(st.just("draw"), st.integers(0, 8), st.integers(0, 99), PROMPTS),
        st.tuples(st.just("checkpoint")),
    ),
    max_size=12,
)


def bytes_of(one: RolloutGroup, half: bool) -> int:
    """By hand: an id of 4 bytes and a log-prob of 4 or 2 per token; per completion two lengths of 4, a finish reason of
    1, a version of 8 and rewards of 4; and its text."""
    tokens, samples = one.completion_tokens, len(one.completions)
    per_completion = 2 * 4 + 1 + 8 + 4 * (2 + len(one.components))
    text = sum(len(completion.text.encode()) for completion in one.completions)
    return tokens * (4 + (2 if half else 4)) + samples * per_completion + text


class PlainList:
    """What the buffer is meant to be, in the shortest words."""

    def __init__(self, capacity: int, max_bytes: int | None, max_age: int | None, half: bool) -> None:
        self.capacity, self.max_bytes, self.max_age, self.half = capacity, max_bytes or 10**9, max_age, half
        self.kept: list[RolloutGroup] = []

    def bytes(self) -> int:
        return sum(bytes_of(one, self.half) for one in self.kept)

    def insert(self, arriving: Sequence[RolloutGroup]) -> list[RolloutGroup]:
        for new in arriving:
            self.kept = [one for one in self.kept if one.prompt.id != new.prompt.id]
            if bytes_of(new, self.half) <= self.max_bytes:
                self.kept.append(new)
            while len(self.kept) > self.capacity or self.bytes() > self.max_bytes:
                del self.kept[0]
        return [new for new in arriving if bytes_of(new, self.half) > self.max_bytes]

    def keep(self, rule: Any) -> int:
        before = len(self.kept)
        self.kept = [one for one in self.kept if rule(one)]
        return before - len(self.kept)


@settings(max_examples=examples(60), deadline=None)
@given(
    st.integers(1, 5),
    st.none() | st.integers(1, 400),
    st.none() | st.integers(1, 8),
    st.sampled_from(["uniform", "advantage"]),
    st.booleans(),
    OPERATIONS,
)
def test_it_does_what_a_plain_list_does(capacity, max_bytes, max_age, draw_by, half, operations):
    def empty() -> ReplayBuffer:
        dtype = "float16" if half else "float32"
        return ReplayBuffer(capacity, max_bytes=max_bytes, max_age=max_age, draw_by=draw_by, logprob_dtype=dtype)

    buffer, plain = empty(), PlainList(capacity, max_bytes, max_age, half)
    for operation in operations:
        match operation:
            case ("insert", arriving):
                assert buffer.insert(iter(arriving)) == plain.insert(arriving)
            case ("discard", names):
                assert buffer.discard(names) == plain.keep(lambda one, names=names: one.prompt.id not in names)
            case ("expire", step):
                young = lambda one, step=step: max_age is None or step - one.birth_step <= max_age  # noqa: E731
                assert buffer.expire(step) == plain.keep(young)
            case ("draw", n, seed, last):
                drawn = buffer.draw(n, generator(seed), last)
                assert_drawn(drawn, plain, n, last, draw_by)
                again = restored(buffer, empty()).draw(n, generator(seed), last)
                assert [one.prompt.id for one in again] == [one.prompt.id for one in drawn]
            case _:
                buffer = restored(buffer, empty())
        assert buffer.nbytes == plain.bytes() <= (max_bytes or 10**9)
        assert len(buffer) == len(plain.kept) <= capacity
        for found, expected in zip(buffer.groups, plain.kept, strict=True):
            assert_equal(found, expected, half)


def assert_drawn(drawn: list[RolloutGroup], plain: PlainList, n: int, last: set[str], draw_by: str) -> None:
    """All there are, no prompt twice: those of `last` after all others, weightless ones after the rest."""
    stored = {one.prompt.id: one for one in plain.kept}
    names = [one.prompt.id for one in drawn]
    assert len(names) == len(set(names)) == min(n, len(stored))
    for one in drawn:
        assert_equal(one, stored[one.prompt.id], plain.half)

    def rank(name: str) -> tuple[bool, bool]:
        rewards = stored[name].rewards
        return name in last, draw_by == "advantage" and (not len(rewards) or not np.ptp(rewards))

    ranks = [rank(name) for name in names]
    assert ranks == sorted(rank(name) for name in stored)[: len(ranks)]


def test_uniform_draws_are_without_replacement_and_leave_the_buffer_as_it_is():
    buffer = ReplayBuffer(6)
    buffer.insert(group(prompt(index), [0, 1]) for index in range(6))
    drawn = np.zeros(6)
    draws = 1500
    for step in range(draws):
        chosen = [int(one.prompt.id[1:]) for one in buffer.draw(2, generator(0, "replay", step))]
        assert len(set(chosen)) == 2
        drawn[chosen] += 1
    # Each prompt is in a draw of 2 out of 6 with probability 1/3: sd of its share = sqrt(1/3 * 2/3 / 1500) = 0.0122.
    assert np.abs(drawn / draws - 1 / 3).max() < 4 * 0.0122
    assert len(buffer) == 6
    assert len(buffer.draw(10, generator(0, "replay", 0))) == 6


WEIGHED = {"p0": [0, 0, 0, 1], "p1": [0, 0, 1, 1], "p2": [0.5, 0.5, 0.5, 0.75], "p3": [1, 1, 1, 1], "p4": [0, 1, 1, 1]}
VARIANCES = {"p0": 3 / 16, "p1": 1 / 4, "p2": 3 / 256, "p3": 0.0, "p4": 3 / 16}


def weighed_buffer(draw_by: str) -> ReplayBuffer:
    buffer = ReplayBuffer(9, draw_by=draw_by)  # type: ignore[arg-type]
    buffer.insert(group(prompt(int(name[1:])), rewards) for name, rewards in WEIGHED.items())
    return buffer


def test_draws_by_advantage_have_the_exact_probabilities():
    """Ordered pairs: `w_i / W`, then `w_j / (W - w_i)`."""
    total = sum(VARIANCES.values())
    expected = {
        (one, other): VARIANCES[one] / total * VARIANCES[other] / (total - VARIANCES[one])
        for one, other in itertools.permutations(VARIANCES, 2)
        if VARIANCES[one] and VARIANCES[other]
    }
    assert sum(expected.values()) == pytest.approx(1)

    def counts(draw_by: str, draws: int) -> dict[tuple[str, ...], int]:
        buffer, found = weighed_buffer(draw_by), dict.fromkeys(itertools.permutations(WEIGHED, 2), 0)
        for step in range(draws):
            found[tuple(one.prompt.id for one in buffer.draw(2, generator(3, "replay", step)))] += 1
        return found

    found = counts("advantage", 3000)
    assert all(found[pair] == 0 for pair in found if "p3" in pair)
    chances = np.array(list(expected.values()))
    assert chisquare([found[pair] for pair in expected], 3000 * chances).pvalue > 0.001
    # The check can fail: it tells a uniform draw apart.
    other = [number for pair, number in counts("uniform", 600).items() if pair in expected]
    assert chisquare(other, sum(other) * chances).pvalue < 1e-9


def test_groups_of_weight_0_come_after_all_others_and_then_uniformly():
    buffer = weighed_buffer("advantage")
    buffer.insert([group(prompt(5), [0, 0, 0, 0])])
    fifth = [buffer.draw(5, generator(0, step)) for step in range(500)]
    assert all({one.prompt.id for one in drawn[:4]} == {"p0", "p1", "p2", "p4"} for drawn in fifth)
    # sd of the share = sqrt(1/4 / 500) = 0.0224.
    assert abs(np.mean([drawn[4].prompt.id == "p3" for drawn in fifth]) - 0.5) < 4 * 0.0224
    assert len(buffer.draw(9, generator(0))) == 6


@pytest.mark.parametrize("rewards", [*WEIGHED.values(), [0.3, 0.9, 0.1], [0.1] * 8, [2.0, -1.0], [1.0]])
def test_the_weight_is_the_mean_squared_advantage(rewards):
    values = torch.tensor(rewards)
    advantages = group_advantages(values, torch.zeros(len(values), dtype=torch.int64), scale="none")
    assert draw_weight(values.numpy()) == pytest.approx(float((advantages**2).mean()), rel=1e-6, abs=0)


def test_the_weights_by_hand():
    for name, rewards in WEIGHED.items():
        assert draw_weight(np.array(rewards, np.float32)) == pytest.approx(VARIANCES[name], abs=1e-12)
    assert draw_weight(np.empty(0, np.float32)) == 0
    # Rewards as far apart as the tolerance are equal.
    assert draw_weight(np.array([0.0, REWARD_TOLERANCE])) == 0
    # One right of three: 1/3 - 1/9, exact although rewards are stored in float32.
    assert draw_weight(np.float32([1, 0, 0])) == pytest.approx(2 / 9, rel=1e-12)


def test_prompts_named_last_are_drawn_when_there_are_no_others():
    buffer = ReplayBuffer(9)
    buffer.insert(group(prompt(index), [0, 1]) for index in range(6))
    for step in range(50):
        names = [one.prompt.id for one in buffer.draw(4, generator(step), last={"p1", "p3", "p5", "p77"})]
        assert set(names[:3]) == {"p0", "p2", "p4"}
        assert names[3] in {"p1", "p3", "p5"}
    # Without such prompts a draw is the one that the generator alone decides.
    plain = [one.prompt.id for one in buffer.draw(4, generator(1))]
    assert plain == [f"p{index}" for index in generator(1).choice(6, size=4, replace=False)]


def test_a_draw_depends_on_its_generator_alone():
    for draw_by in ("uniform", "advantage"):
        buffer = weighed_buffer(draw_by)
        first, again, other = (
            [one.prompt.id for one in buffer.draw(4, generator(seed, "replay", 5))] for seed in (1, 1, 2)
        )
        assert first == again != other


def test_a_checkpoint_gives_back_every_value():
    stored = [group(prompt(2), [0, 1, 1], birth=3, source="reference"), group(prompt(0), [0.25, 1], birth=4)]
    buffer = ReplayBuffer(5)
    buffer.insert(stored)
    for after, before in zip(restored(buffer, ReplayBuffer(5)).groups, stored, strict=True):
        assert_equal(after, before)


def test_a_checkpoint_is_taken_over_by_another_dtype():
    buffer = ReplayBuffer(5)
    stored = [group(prompt(2), [0, 1, 1]), group(prompt(0), [0, 1])]
    buffer.insert(stored)
    halved = restored(buffer, ReplayBuffer(5, logprob_dtype="float16"))
    assert halved.nbytes == sum(bytes_of(one, half=True) for one in stored)
    for after, before in zip(halved.groups, stored, strict=True):
        assert_equal(after, before, half=True)


def talks(index: int) -> RolloutGroup:
    """A group of two conversations and a completion without turns."""
    values = np.array([0, 1, 0.5], np.float32)
    calls = [{"type": "function", "function": {"name": "é\ud800", "arguments": {"x": 0.1, "y": [1, None, True]}}}]
    first = conversation(("assistant", [3, 4]), ("tool", [6]), ("assistant", []), context=[1, 2, 9])
    odd = Turn(True, 0, [{"role": "assistant", "content": "", "tool_calls": calls}])
    members = (
        replace(first, turns=(*first.turns[:2], odd), outcome=Outcome(1.0, b"pickled")),
        completion((5, 6, 7)),
        conversation(("assistant", [8]), ("user", [9, 9])),
    )
    return RolloutGroup(prompt(index), members, values, values, {"exact": values}, "fresh", 2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_conversations_survive_exactly_but_for_their_outcome(dtype):
    stored = [talks(1), group(prompt(0), [0, 1]), talks(2)]
    buffer = ReplayBuffer(5, logprob_dtype=dtype)
    buffer.insert(stored)
    for kept in (buffer, restored(buffer, ReplayBuffer(5, logprob_dtype=dtype))):
        for found, expected in zip(kept.groups, stored, strict=True):
            assert_equal(found, expected, half=dtype == "float16")
            assert all(one.outcome is None for one in found.completions)
    first = buffer.groups[0].completions[0]
    assert np.isnan(first.logprobs).tolist() == [False, False, True]
    assert first.generated.tolist() == [True, True, False]


def test_a_group_without_turns_costs_nothing_for_them():
    packed = pack(group(prompt(0), [0, 1, 1]))
    assert sum(getattr(packed, name).nbytes for name in ("turns", "turn_lengths", "context", "context_lengths")) == 0


def test_a_checkpoint_from_before_conversations_is_read():
    stored = [group(prompt(1), [0, 1]), group(prompt(0), [1, 0, 1])]
    state = pack_groups(stored)
    for part in (state["arrays"], state["sizes"]):
        for name in ("turns", "turn_lengths", "context", "context_lengths"):
            del part[name]
    for found, expected in zip(unpack_groups(state, POOL), stored, strict=True):
        assert_equal(found, expected)


def test_nothing_packs_to_nothing():
    assert unpack_groups(pack_groups([]), pool(1)) == []


def test_odd_text_survives():
    odd = group(prompt(0), [0, 1])
    texts = ("a\ud800b", "é漢\ufffd")  # a lone surrogate cannot be written in plain UTF-8
    members = tuple(
        Completion(one.token_ids, one.logprobs, "length", 3, text)
        for one, text in zip(odd.completions, texts, strict=True)
    )
    odd = RolloutGroup(odd.prompt, members, odd.rewards, odd.correctness, odd.components, "fresh", 1)
    assert [one.text for one in unpack_groups(pack_groups([odd]), POOL)[0].completions] == list(texts)


def test_entries_keep_no_larger_array_alive():
    padded_ids, padded_logprobs = np.zeros((2, 4096), np.int32), np.zeros((2, 4096), np.float32)
    values = np.array([0, 1], np.float32)
    members = tuple(Completion(padded_ids[row, :3], padded_logprobs[row, :3], "stop", 0, "") for row in range(2))
    entry = pack(RolloutGroup(prompt(0), members, values, values, {"exact": values}, "fresh", 0))
    buffer = ReplayBuffer(3)
    buffer.insert([group(prompt(index), [0, 1]) for index in range(3)])
    kept = [entry, *restored(buffer, ReplayBuffer(3))._entries.values()]
    for one in kept:
        arrays = [getattr(one, name) for name in one.__slots__ if isinstance(getattr(one, name), np.ndarray)]
        assert len(arrays) == 14
        assert one.nbytes == sum(array.nbytes for array in arrays)
        # An array owns its memory, or is a reshaped view of one as large as itself.
        assert all(array.base is None or array.base.nbytes == array.nbytes for array in arrays)


def test_float16_moves_an_importance_ratio_by_no_more_than_it_says():
    rng = np.random.default_rng(0)
    exact = -np.exp(rng.uniform(np.log(1e-8), np.log(60), size=(200, 512))).astype(np.float32)
    stored = Completion(np.zeros(exact.size, np.int32), exact.reshape(-1), "stop", 0, "")
    values = np.zeros(1, np.float32)
    buffer = ReplayBuffer(1, logprob_dtype="float16")
    buffer.insert([RolloutGroup(prompt(0), (stored,), values, values, {}, "fresh", 0)])
    (drawn,) = buffer.draw(1, generator(0))
    wide = exact.astype(np.float64)
    error = drawn.completions[0].logprobs.reshape(exact.shape) - wide
    bound = np.maximum(2.0**-11 * np.abs(wide), 2.0**-25)
    assert (np.abs(error) <= bound).all()
    # The bound is reached: it is not stated too wide.
    assert (np.abs(error) / bound).max() > 0.99
    # pi / mu of one token: at pi = mu it is 1 exactly, from float16 at most this far away.
    likely, unlikely = wide > -1, (wide <= -1) & (wide > -8)
    assert np.abs(np.expm1(-error[likely])).max() <= np.expm1(2.0**-11) < 0.0005
    assert np.abs(np.expm1(-error[unlikely])).max() <= np.expm1(8 * 2.0**-11) < 0.004
    # Over a completion the errors mostly cancel: independent, uniform within half a unit of the last place.
    spread = np.sqrt((np.spacing(exact.astype(np.float16)).astype(np.float64) ** 2 / 12).sum(axis=1))
    assert (np.abs(error.sum(axis=1)) < 5 * spread).all()


def test_float16_has_a_value_for_the_least_likely_token():
    least = Completion(np.array([1], np.int32), np.array([-1e6], np.float32), "stop", 0, "")
    values = np.zeros(1, np.float32)
    packed = pack(RolloutGroup(prompt(0), (least,), values, values, {}, "fresh", 0), "float16")
    assert packed.logprobs.tolist() == [-65504.0]


def test_the_oldest_age_allowed_stays():
    buffer = ReplayBuffer(9, max_age=2)
    buffer.insert(group(prompt(index), [0, 1], birth=index) for index in range(5))
    assert buffer.expire(4) == 2
    assert [one.birth_step for one in buffer.groups] == [2, 3, 4]
    assert ReplayBuffer(9).expire(10**6) == 0


def test_a_checkpoint_takes_the_place_of_what_was_there():
    before, after = ReplayBuffer(5), ReplayBuffer(5)
    before.insert([group(prompt(1), [0, 1])])
    after.insert([group(prompt(2), [0, 1, 1])])
    after.load_state_dict(before.state_dict(), POOL)
    assert [one.prompt.id for one in after.groups] == ["p1"]
    assert after.nbytes == before.nbytes


def test_a_group_of_just_the_bytes_allowed_is_kept():
    one = group(prompt(0), [0, 1])
    size = bytes_of(one, half=False)
    assert ReplayBuffer(2, max_bytes=size).insert([one]) == []
    assert ReplayBuffer(2, max_bytes=size - 1).insert([one]) == [one]


def test_weights_of_0_raise_no_warning():
    with np.errstate(all="raise"):
        drawn = weighed_buffer("advantage").draw(5, generator(0))
    assert drawn[4].prompt.id == "p3"
