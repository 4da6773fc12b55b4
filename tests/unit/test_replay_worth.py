"""The worth of replayed groups against its threshold, and what the replay callback makes of it; worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import LightningModule, Trainer

from callbacks import GenerationCost, RolloutReplay, Rollouts, RunLedger, WeightSync
from callbacks.algorithm.replay_buffer import ReplayBuffer
from callbacks.algorithm.replay_worth import ENOUGH, PROBE_EVERY, Cost, ReplayWorth, agreement, ratio
from callbacks.stages import Stage, StepCallback
from datamodules.errors import UserError
from datamodules.seeding import generator
from datamodules.types import GroupSketch, Source, TrainBatch
from tests.support.builders import group, pool, prompt
from tests.support.scripted_run import HALF, WRONG, names, scripted_run
from tests.unit.test_replay import PER_STEP, batch_of, begin, end, on_data, resumed

FIVE_TO_ONE = Cost(generating=20, generated=8, informative=4, updating=2, updated=4)
"""c_g = 2.5, c_u = 0.5, y = 0.5: the threshold is 1 / (1 + 2.5 / 0.25) = 1/11."""


def sketch(vector: list[float], source: Source = "fresh") -> GroupSketch:
    return GroupSketch(0, "p", source, 0, np.array(vector, dtype=np.float32))


def test_agreement_leaves_out_a_group_with_itself():
    fresh, replayed = np.array([[1.0, 0], [1, 1], [0, 2]]), np.array([[1.0, 1], [2, 0]])
    # Replayed with fresh: (1 + 2 + 2) + (2 + 2 + 0) over 6 pairs. Fresh: <a, b> = 1, <a, c> = 0, <b, c> = 2.
    assert agreement(replayed, fresh) == pytest.approx((9 / 6, 3 / 3))


def test_ratio_of_sums_and_its_jackknife_error():
    # All: 6 / 12. Without one of them: 5 / 8, 4 / 6 and 3 / 10, whose mean is 191 / 360.
    value, error = ratio([(1, 4), (2, 6), (3, 2)])
    spread = sum((one - 191 / 360) ** 2 for one in (5 / 8, 4 / 6, 3 / 10))
    assert (value, error) == pytest.approx((0.5, math.sqrt(2 / 3 * spread)))
    assert math.isnan(ratio([(1, 4)])[1])


def test_threshold_by_hand():
    assert FIVE_TO_ONE.threshold() == pytest.approx(1 / 11)
    # Silent groups are read too: an informative one costs 2 (2.5 + 0.5) seconds, a replayed one 0.5.
    assert FIVE_TO_ONE.threshold(reads_silent=True) == pytest.approx(0.5 / 6)
    assert math.isnan(Cost(1, 0, 0, 1, 1).threshold())
    assert Cost(1, 4, 0, 1, 1).threshold() == 0


def test_the_share_rises_while_replay_pays_and_falls_while_it_does_not():
    worth = ReplayWorth()
    assert worth.groups(4, 3) == 1  # to measure
    fresh = [sketch([1, 0]), sketch([1, 0.0])]
    for step in range(ENOUGH + 3):
        worth.observe([*fresh, sketch([0.5, 1], "replay"), sketch([0, 0])], FIVE_TO_ONE, reads_silent=False)
        assert worth.share == min(1, max(0, step + 2 - ENOUGH) / 4)
    assert worth.worth() == pytest.approx((0.5, 0))
    assert worth.groups(4, 3) == 4
    again = ReplayWorth()
    again.load_state_dict(worth.state_dict())
    assert again.state_dict() == worth.state_dict()
    # Each measurement of -1 takes 1.5 / n from the mean; 5 of 16 make 0.03, which is below 1 / 11.
    shares = []
    for _ in range(9):
        worth.observe([*fresh, sketch([-1, 1], "replay")], FIVE_TO_ONE, reads_silent=False)
        shares.append(worth.share)
    assert shares == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [step for step in range(1, 40) if worth.groups(4, step)] == [PROBE_EVERY, 2 * PROBE_EVERY]
    # Nothing replayed, or a single fresh group: nothing is measured.
    before = worth.worth()
    worth.observe(fresh, FIVE_TO_ONE, reads_silent=False)
    worth.observe([fresh[0], sketch([9, 9], "replay")], FIVE_TO_ONE, reads_silent=False)
    assert worth.worth() == before and worth.share == 0


def test_a_group_is_replayed_as_often_as_it_may_be():
    replay, data = on_data(RolloutReplay(max_uses=2), 30)
    end(replay, batch_of(0, [group(prompt(index), [0, 1]) for index in range(3)]))
    found: list[str] = []
    for step in range(1, 5):
        batch = batch_of(step, [group(prompt(10 + 3 * step + row), [0, 0], birth=step) for row in range(3)])
        found += names(begin(replay, batch))
        end(replay, batch)
        if step == 1:
            replay = resumed(replay, data, max_uses=2)
    assert sorted(found) == ["p0", "p0", "p1", "p1", "p2", "p2"]
    assert len(replay.buffer) == 0 and data.fresh_prompts == PER_STEP


def test_drift_is_that_of_the_replayed_tokens_and_lowers_the_priority():
    buffer = ReplayBuffer(8, draw_by="drift", drift_scale=0.1)
    buffer.insert(group(prompt(index), [0, 1], birth=index) for index in range(4))
    assert buffer.expected_drift("p0", 4) == 0
    buffer.measured({"p0": 0.4, "p2": 0.1, "gone": 9.0}, 4)
    # Rates 0.4 / 4 and 0.1 / 2, so 0.075 per step; in step 6 the groups are at:
    assert buffer.drift_rate == pytest.approx(0.075)
    expected = [0.4 + 0.15, 5 * 0.075, 0.1 + 0.15, 3 * 0.075]
    assert [buffer.expected_drift(f"p{index}", 6) for index in range(4)] == pytest.approx(expected)
    again = ReplayBuffer(8, draw_by="drift")
    again.load_state_dict(buffer.state_dict(), pool(4))
    assert [again.expected_drift(f"p{index}", 6) for index in range(4)] == pytest.approx(expected)
    counts = dict.fromkeys(("p0", "p1", "p2", "p3"), 0)
    for seed in range(4000):
        (one,) = buffer.draw(1, generator(seed, "test"), step=6)
        counts[one.prompt.id] += 1
    weights = np.exp(-np.array(expected) / 0.1)
    # Four standard deviations of a binomial share.
    assert np.array(list(counts.values())) / 4000 == pytest.approx(weights / weights.sum(), abs=4 * 0.5 / 4000**0.5)


def test_silent_groups_give_up_their_places():
    replay, data = on_data(RolloutReplay(places="silent", fresh_fraction=0.5), 30)
    end(replay, batch_of(0, [group(prompt(index), [0, 1]) for index in range(6)]))
    assert data.fresh_prompts == PER_STEP  # all of them are rolled out
    for step, silent, taken in ((1, 2, 2), (2, 5, 3), (3, 0, 0)):
        rewards = [[1, 1]] * silent + [[0, 1]] * (PER_STEP - silent)
        batch = batch_of(step, [group(prompt(6 + PER_STEP * step + row), one) for row, one in enumerate(rewards[::-1])])
        begin(replay, batch)
        assert [one.source for one in batch.groups].count("replay") == taken and len(batch.groups) == PER_STEP
        assert [one.informative for one in batch.of("dropped")] == [False] * taken
        assert sum(one.informative for one in batch.groups) == PER_STEP - silent + taken


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_uses": 0}, "max_uses is 0, expected at least 1. Raise it, or set null"),
        ({"drift_scale": 0.0}, "drift_scale is 0.0, expected a number above 0"),
        ({"share": "automatic"}, "share is 'automatic'; did you mean 'auto'"),
        ({"places": "quiet"}, "places is 'quiet'; "),
    ],
)
def test_impossible_options_are_refused(options: dict[str, object], told: str):
    with pytest.raises(UserError, match=told):
        RolloutReplay(**options)  # type: ignore[arg-type]


def test_a_run_follows_its_own_seconds_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """A token costs a thousand seconds, so any worth above 0 pays; the clock has them, too."""
    replay, cost = RolloutReplay(share="auto", capacity=64, admit="informative"), GenerationCost(1000.0)
    callbacks = [WeightSync(), Rollouts(), replay, cost, RunLedger()]
    with caplog.at_level("INFO"):
        run = scripted_run(tmp_path, monkeypatch, [HALF] * 60 + [WRONG] * 4, callbacks, steps=24)
    last = run.steps[-1]
    assert "replay/worth" not in {name for name, value in run.steps[0].metrics.items() if not math.isnan(value)}
    assert all(one.metrics["replay/drift"] >= 0 for one in run.steps[1:] if one.metrics["replay/fraction"])
    assert 0 < last.metrics["replay/threshold"] < 0.01
    tokens = sum(one.counts["train/tokens"] for one in run.steps)
    assert last.metrics["time/rollout"] == pytest.approx(1000 * last.counts["train/tokens"], rel=0.01)
    assert last.metrics["time/training"] == pytest.approx(1000 * tokens, rel=0.01)
    # One group to measure with; some groups have equal completions and no gradient, and measure nothing.
    assert [round(4 * one.metrics["replay/fraction"]) for one in run.steps[: ENOUGH + 1]] == [0, *[1] * ENOUGH]
    told = [one.getMessage() for one in caplog.records if "RolloutReplay, step" in one.getMessage()]
    assert len(told) >= 1 and "a replayed group is worth " in told[0] and replay.worth is not None
    pays = last.metrics["replay/share"] > 0
    assert ("so groups are replayed" in told[-1]) == pays


class Waiting(StepCallback):
    """Lets every generated token have cost a thousand seconds of waiting for an environment."""

    stage = Stage.FILTER

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        batch.ledger.seconds["environment"] += 1000.0 * batch.ledger.counts["train/tokens"]


def test_waiting_for_an_environment_is_part_of_what_a_fresh_group_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    replay = RolloutReplay(share="auto", capacity=64, admit="informative")
    callbacks = [WeightSync(), Rollouts(), replay, Waiting(), RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, [HALF] * 60 + [WRONG] * 4, callbacks, steps=3)
    assert replay.worth is not None and 0 < replay.worth.cost().threshold() < 0.01
    assert "time/environment" not in run.steps[-1].metrics  # for a run without an environment
