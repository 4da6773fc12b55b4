"""The replay callback over many steps, against a plain account of the expected buffer and batch."""

from __future__ import annotations

import io
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from callbacks import RolloutReplay
from datamodules.errors import UserError
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts.file import PromptFile
from datamodules.types import RolloutGroup, TrainBatch
from tests.support.builders import group, pool, prompt
from tests.support.scripted_run import names

PER_STEP = 6


def on_data(replay: RolloutReplay, prompts: int) -> tuple[RolloutReplay, OnlinePromptDataModule]:
    """Set up the callback on a data module whose pool is in memory."""
    data = OnlinePromptDataModule(PromptFile("unread.jsonl"), prompts_per_step=PER_STEP, seed=0)
    data.pools["train"] = pool(prompts)
    replay.setup(SimpleNamespace(datamodule=data), None, "fit")  # type: ignore[arg-type]
    return replay, data


def begin(replay: RolloutReplay, batch: TrainBatch) -> list[RolloutGroup]:
    """Return the groups that the callback adds to a batch."""
    before = len(batch.groups)
    replay.on_train_batch_start(None, None, batch, batch.step)  # type: ignore[arg-type]
    return batch.groups[before:]


def end(replay: RolloutReplay, batch: TrainBatch) -> None:
    replay.on_train_batch_end(None, None, None, batch, batch.step)  # type: ignore[arg-type]


def batch_of(step: int, groups: list[RolloutGroup], **others: list[RolloutGroup]) -> TrainBatch:
    batch = TrainBatch(step, ())
    batch.add(groups)
    for fate, given in others.items():
        batch.add(given, fate)
    return batch


def outcome(rng: np.random.Generator, index: int, step: int) -> RolloutGroup:
    """Return a fresh group: all wrong, all right, mixed, or without any score."""
    rewards = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1], []][rng.integers(6)]
    return group(prompt(index), rewards, birth=step, source="reference" if rng.random() < 0.2 else "fresh")


def resumed(replay: RolloutReplay, data: OnlinePromptDataModule, **options: Any) -> RolloutReplay:
    written = io.BytesIO()
    torch.save(replay.state_dict(), written)
    written.seek(0)
    again = RolloutReplay(**options)
    again.setup(SimpleNamespace(datamodule=data), None, "fit")  # type: ignore[arg-type]
    again.load_state_dict(torch.load(written, weights_only=True))
    return again


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_age": 1},
        {"max_age": 3, "draw": "advantage", "logprob_dtype": "float16"},
        {"admit": "all", "capacity": 4, "fresh_fraction": 0.3},
        {"admit": "all", "draw": "advantage", "max_age": 2, "fresh_fraction": 0.1},
    ],
)
def test_random_steps(options: dict[str, Any], seed: int):
    """Nine prompts and six a step: most prompts are rolled out again while they are stored."""
    rng = np.random.default_rng(seed)
    replay, data = on_data(RolloutReplay(**options), 9)
    kept: dict[str, int] = {}  # prompt -> birth step, oldest entry first
    stale = old = 0
    for step in range(25):
        if step % 7 == 6:
            replay = resumed(replay, data, **options)
        chosen = rng.permutation(9)
        fresh = [outcome(rng, index, step) for index in chosen[: data.fresh_prompts]]
        spare = [outcome(rng, index, step) for index in chosen[data.fresh_prompts :]]
        batch = batch_of(step, fresh, surplus=spare[:1], dropped=spare[1:2])
        measured = {one.prompt.id for one in (*fresh, *spare[:2]) if len(one.rewards)}
        assert names(replay.buffer.groups) == list(kept)
        drawn = begin(replay, batch)
        # Never a smaller batch; nothing too old; a prompt measured in this step only when nothing else is left.
        assert len(batch.groups) == PER_STEP
        assert all(kept[one.prompt.id] == one.birth_step and one.source == "replay" for one in drawn)
        assert all(1 <= step - one.birth_step <= options.get("max_age", 99) for one in drawn)
        again = [name in measured for name in names(drawn)]
        assert len(set(names(drawn))) == len(drawn) and again == sorted(again)
        assert not any(again) or kept.keys() - measured <= set(names(drawn))
        ages = [step - one.birth_step for one in drawn] or [0]
        assert batch.metrics["replay/size"] == len(kept)
        assert batch.metrics["replay/dropped_stale"] == len(kept.keys() & measured)
        assert (batch.metrics["replay/age_mean"], batch.metrics["replay/age_max"]) == (np.mean(ages), max(ages))
        assert batch.metrics["replay/fraction"] == len(drawn) / PER_STEP
        assert batch.ledger.counts["replayed_groups"] == len(drawn)
        stale += len(kept.keys() & measured)
        kept = {name: birth for name, birth in kept.items() if name not in measured}
        assert names(replay.buffer.groups) == list(kept)

        end(replay, batch)
        everything = options.get("admit") == "all"
        for one in (*spare[:1], *fresh):
            if one.informative or (everything and len(one.rewards)):
                kept[one.prompt.id] = one.birth_step
        kept = dict(list(kept.items())[-options.get("capacity", 512) :])
        young = {name: at for name, at in kept.items() if step + 1 - at <= options.get("max_age", 99)}
        assert batch.metrics["replay/dropped_old"] == len(kept) - len(young)
        old += len(kept) - len(young)
        kept = young
        per_step = PER_STEP - max(1, round(options.get("fresh_fraction", 0.5) * PER_STEP))
        assert data.fresh_prompts == PER_STEP - min(per_step, len(kept))
    assert stale > 5
    assert old > 0 or "max_age" not in options


@pytest.mark.parametrize("place", ["groups", "surplus", "dropped"])
@pytest.mark.parametrize("rewards", [[0, 0], [1, 1], [0, 1], []])
def test_a_prompt_rolled_out_again_loses_its_stored_group(place: str, rewards: list[float]):
    replay, _ = on_data(RolloutReplay(), 9)
    end(replay, batch_of(0, [group(prompt(index), [0, 1]) for index in range(6)]))
    new = [group(prompt(0), rewards, birth=1)]
    rest = [group(prompt(index), [0, 1], birth=1) for index in (6, 7, 8)]
    batch = batch_of(1, rest + new) if place == "groups" else batch_of(1, rest, **{place: new})
    drawn = begin(replay, batch)
    # A group that lost all its scores measured nothing.
    assert batch.metrics["replay/dropped_stale"] == (1 if rewards else 0)
    assert ("p0" in names(drawn)) <= (not rewards)
    end(replay, batch)
    found = {one.prompt.id: one.birth_step for one in replay.buffer.groups}
    assert found.get("p0") == (0 if not rewards else 1 if rewards == [0, 1] and place != "dropped" else None)
    assert {name for name, birth in found.items() if birth == 0} - {"p0"} == {"p1", "p2", "p3", "p4", "p5"}


def test_memory_stays_within_its_bound_and_a_group_that_is_too_large_is_reported_once():
    one = group(prompt(0), [0, 1])
    # By hand: 3 tokens of 8 bytes, 2 completions of 8 + 1 + 8 + 12 bytes, 2 texts of 2 bytes.
    size = 3 * 8 + 2 * 29 + 4
    replay, _ = on_data(RolloutReplay(max_bytes=2 * size + 1), 9)
    end(replay, batch_of(0, [group(prompt(index), [0, 1]) for index in range(5)]))
    assert names(replay.buffer.groups) == ["p3", "p4"]
    batch = batch_of(1, [one])
    begin(replay, batch)
    assert (batch.metrics["replay/size"], batch.metrics["replay/bytes"]) == (2, 2 * size)
    large = [group(prompt(index), [0, 1] * 3) for index in (6, 7)]
    with pytest.warns(UserWarning, match="prompt p6 .* is larger than the whole buffer"):
        end(replay, batch_of(1, large))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end(replay, batch_of(2, large))
    assert names(replay.buffer.groups) == ["p3", "p4"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"fresh_fraction": 0.0}, r"fresh_fraction is 0.0, expected a number in \(0, 1\]"),
        ({"fresh_fraction": float("nan")}, r"fresh_fraction is nan, expected a number in \(0, 1\]"),
        ({"capacity": 0}, "capacity is 0, expected at least 1"),
        ({"max_bytes": 0}, "max_bytes is 0, expected at least 1. Raise it, or set null"),
        ({"max_age": 0}, "max_age is 0, expected at least 1. Raise it, or set null"),
        ({"draw": "advantages"}, "draw is 'advantages'; did you mean 'advantage'"),
        ({"logprob_dtype": "bfloat16"}, "logprob_dtype is 'bfloat16'; did you mean 'float16'"),
        ({"admit": "some"}, "admit is 'some'; "),
    ],
)
def test_impossible_options_are_refused_in_one_line(options: dict[str, Any], told: str):
    with pytest.raises(UserError, match=told) as error:
        RolloutReplay(**options)
    assert "\n" not in str(error.value)


def test_a_batch_that_is_full_or_more_takes_nothing_from_the_buffer():
    replay, _ = on_data(RolloutReplay(admit="all"), 20)
    stored = batch_of(0, [group(prompt(index), [0, 1]) for index in range(4)])
    begin(replay, stored)
    end(replay, stored)
    for step, size in ((1, PER_STEP), (2, PER_STEP + 2)):
        assert begin(replay, batch_of(step, [group(prompt(10 + index), [0, 1]) for index in range(size)])) == []
    assert len(begin(replay, batch_of(3, [group(prompt(10), [0, 1])]))) == 4
