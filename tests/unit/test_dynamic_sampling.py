"""Which groups pass, how often the batch is refilled, and where everything generated ends up."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from callbacks import Balanced, DynamicSampling, ReferenceRollouts, RolloutReplay, Rollouts, RunLedger, WeightSync
from datamodules.errors import UserError
from datamodules.selectors import SelectionContext, Uniform
from datamodules.types import REWARD_TOLERANCE, TrainBatch
from tests.support.builders import group, pool, prompt
from tests.support.scripted_run import HALF, QUARTER, RIGHT, WRONG, names, scripted_run


class Eager(Uniform):
    """Asks for as many prompts in every refill as in the first choice."""

    def refill_size(self, missing: int, default: int, kept_fraction: float) -> int:
        return default


def uniform_order(size: int) -> list[str]:
    selector = Uniform()
    selector.setup(pool(size), SelectionContext(0))
    return selector.choose(size)


@pytest.mark.parametrize(
    ("rewards", "any_difference", "medium"),
    [
        ([0, 0, 0, 0], False, False),
        ([1, 1, 1, 1], False, False),
        ([0.5, 0.5, 0.5, 0.5], False, False),  # equal rewards teach nothing, whatever their mean
        ([0.5, 0.5, 0.5, 0.5 + 1e-7], False, False),  # nor do rewards that differ by less than the tolerance
        ([0, 0, 0, 1], True, False),
        ([1, 1, 1, 0], True, False),
        ([1, 0, 1, 0], True, True),
        ([1, 1, 1, 0, 0, 0, 0, 0, 0, 0], True, True),  # 3 of 10: the border is inclusive
        ([1, 1, 1, 1, 1, 1, 1, 0, 0, 0], True, True),  # 7 of 10
        ([1, 1, 0, 0, 0, 0, 0, 0, 0, 0], True, False),
        ([1, 1, 1, 1, 1, 1, 1, 1, 0, 0], True, False),
        ([1], False, False),  # the rest of a group whose other scores failed
        ([], False, False),
    ],
)
def test_the_rule_looks_at_the_whole_group_and_at_the_borders_of_the_band(rewards, any_difference, medium):
    found = group(prompt(0), rewards)
    assert DynamicSampling().passes(found) is any_difference
    assert Balanced().passes(found) is medium


def test_one_border_may_be_left_open():
    assert DynamicSampling(high=0.5).passes(group(prompt(0), [0, 0, 0, 1]))
    assert not DynamicSampling(high=0.5).passes(group(prompt(0), [0, 1, 1, 1]))
    # Rewards of a user's scale: no bound is meant to cut them off.
    assert DynamicSampling().passes(group(prompt(0), [3, 5]))


@pytest.mark.parametrize(
    ("options", "told"),
    [({"low": 0.7, "high": 0.3}, "low <= high"), ({"max_refills": -1}, "max_refills is -1, expected at least 0")],
)
def test_impossible_options_are_refused_in_one_line(options, told):
    with pytest.raises(UserError, match=told) as error:
        DynamicSampling(**options)
    assert "\n" not in str(error.value)


def test_forecasts_of_added_prompts_stay_aligned_with_their_prompts():
    batch = TrainBatch(0, ())
    batch.add_prompts([prompt(0), prompt(1)], None)
    assert batch.forecast is None
    batch.add_prompts([prompt(2)], np.array([0.25]))
    batch.add_prompts([prompt(3), prompt(4)], None)
    assert [one.id for one in batch.prompts] == ["p0", "p1", "p2", "p3", "p4"]
    np.testing.assert_array_equal(batch.forecast, [np.nan, np.nan, 0.25, np.nan, np.nan])


def test_the_batch_is_refilled_with_what_is_missing_until_it_is_full(tmp_path, monkeypatch):
    patterns = [HALF if i % 3 == 0 else RIGHT if i % 3 == 1 else WRONG for i in range(40)]
    run = scripted_run(tmp_path, monkeypatch, patterns, [WeightSync(), Rollouts(), DynamicSampling(), RunLedger()])
    waiting = uniform_order(40)
    generated = 0
    for step in run.steps:
        # By hand: take as many from the pool's order as are missing, until four pass.
        kept, dropped, rounds = [], [], 0
        while len(kept) < 4:
            taken, waiting = waiting[: 4 - len(kept)], waiting[4 - len(kept) :]
            kept += [name for name in taken if int(name[1:]) % 3 == 0]
            dropped += [name for name in taken if int(name[1:]) % 3]
            rounds += 1
        assert rounds > 2
        assert names(step.groups) == kept
        assert names(step.dropped) == dropped
        assert step.surplus == []
        assert sorted(step.prompts) == sorted(kept + dropped)
        assert step.metrics["sampling/refills"] == rounds - 1
        assert step.metrics["sampling/dropped_fraction"] == pytest.approx(len(dropped) / (4 + len(dropped)))
        assert step.metrics["sampling/groups_per_passed"] == pytest.approx((4 + len(dropped)) / 4)
        assert step.metrics["sampling/missing"] == 0
        assert step.counts["train/prompts"] == 4 + len(dropped)
        generated += 4 + len(dropped)
    summary = json.loads((tmp_path / "lightning_logs" / "version_0" / "summary.json").read_text())
    assert summary["prompts_rolled_out"] == generated
    assert summary["discarded"]["prompts"] == generated - 8
    assert summary["discarded"]["completions"] == 4 * (generated - 8)
    assert summary["discarded"]["tokens"] == sum(one.completion_tokens for s in run.steps for one in s.dropped) > 0
    assert summary["wasted"] == {"prompts": 0, "completions": 0, "tokens": 0}
    # The selector has seen the dropped ones too: none came back while the pass over the pool lasted.
    everything = [name for step in run.steps for name in step.prompts]
    assert len(set(everything)) == len(everything) == generated


@pytest.mark.parametrize("replay", [True, False])
def test_what_passes_beyond_the_need_is_kept_for_replay_or_counted_as_wasted(tmp_path, monkeypatch, replay):
    patterns = [WRONG if i % 4 == 0 else HALF for i in range(48)]
    buffer = [RolloutReplay(fresh_fraction=0.5, capacity=64)] if replay else []
    callbacks = [WeightSync(), Rollouts(), DynamicSampling(), *buffer, RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, patterns, callbacks, selector=Eager(), steps=3, prompts_per_step=8)
    surplus = 0
    for step in run.steps:
        fresh = [one for one in step.groups if one.source == "fresh"]
        assert all(one.informative for one in step.groups)
        assert len(step.groups) == 8
        assert len(fresh) + len(step.dropped) + len(step.surplus) == step.counts["train/prompts"]
        # Kept in the order of generation, followed by the surplus.
        passed = [name for name in step.prompts if int(name[1:]) % 4]
        assert names(fresh) + names(step.surplus) == passed
        surplus += len(step.surplus)
    assert surplus > 0
    summary = json.loads((tmp_path / "lightning_logs" / "version_0" / "summary.json").read_text())
    assert summary["wasted"]["prompts"] == (0 if replay else surplus)
    assert summary["wasted"]["completions"] == (0 if replay else 4 * surplus)
    if replay:
        stored = set(names(buffer[0].buffer.groups))
        assert {name for step in run.steps for name in names(step.surplus)} <= stored
        assert not {name for step in run.steps for name in names(step.dropped)} & stored
        assert summary["replayed_groups"] == 8


def test_at_the_cap_the_step_trains_on_what_there_is(tmp_path, monkeypatch):
    order = uniform_order(40)
    # In the order of choice every eighth prompt teaches: 1 of the first 4, none of the 3 that replace the others.
    patterns = [HALF if order.index(f"p{i}") % 8 == 0 else RIGHT for i in range(40)]
    run = scripted_run(tmp_path, monkeypatch, patterns, [WeightSync(), Rollouts(), DynamicSampling(max_refills=1)])
    first = run.steps[0]
    assert names(first.groups) == [order[0]]
    assert names(first.dropped) == order[1:7]
    assert (first.metrics["sampling/refills"], first.metrics["sampling/missing"]) == (1, 3)
    assert first.metrics["selection/informative_fraction"] == 1
    # The next step: order[7] dropped, order[8] kept, 9 and 10 dropped, then three more.
    assert names(run.steps[1].groups) == [order[8]]
    assert run.trainer.global_step == 2


def test_the_buffer_fills_what_the_cap_left_open(tmp_path, monkeypatch):
    order = uniform_order(60)
    # Four prompts of the first step teach, then none.
    patterns = [HALF if order.index(f"p{i}") < 4 else WRONG for i in range(60)]
    callbacks = [WeightSync(), Rollouts(), DynamicSampling(max_refills=2), RolloutReplay(fresh_fraction=1.0)]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*dropped groups are trained on.*")
        run = scripted_run(tmp_path, monkeypatch, patterns, callbacks)
    second = run.steps[1]
    assert {one.source for one in second.groups} == {"replay"}
    assert sorted(names(second.groups)) == sorted(order[:4])
    assert len(second.dropped) == 12
    assert second.metrics["sampling/missing"] == 4


@pytest.mark.parametrize("reuse", ["train", "buffer"])
def test_a_refill_takes_a_reference_group_of_the_step_as_it_is(tmp_path, monkeypatch, reuse):
    references = Uniform()
    references.setup(pool(30), SelectionContext(0))
    measured = set(references.choose_references(20))
    patterns = [HALF if i % 2 == 0 else WRONG for i in range(30)]
    callbacks = [WeightSync(), ReferenceRollouts(size=20, every=99, reuse=reuse), Rollouts(), DynamicSampling()]
    run = scripted_run(tmp_path, monkeypatch, patterns, callbacks, steps=1)
    (step,) = run.steps
    refilled = step.prompts[4:]
    assert measured & set(refilled) and set(refilled) - measured
    chosen = step.groups + step.dropped
    assert sorted(names(chosen)) == sorted(step.prompts)
    taken = {name for name in step.prompts if name in measured} if reuse == "train" else set()
    assert {one.prompt.id for one in chosen if one.source == "reference"} == taken
    assert step.counts["train/prompts"] == len(step.prompts) - len(taken)
    assert step.counts["discarded/prompts"] == sum(one.source == "fresh" for one in step.dropped)
    # The other references wait for the buffer, each once.
    assert sorted(names(step.surplus)) == sorted(measured - taken)


def test_a_pool_without_any_prompt_that_passes_trains_on_and_says_so_once(tmp_path, monkeypatch):
    # 9 prompts: the first choice of 4 and refills of 4 and 1 exhaust the pool in every step.
    patterns = [QUARTER if i == 5 else RIGHT for i in range(9)]
    with pytest.warns(UserWarning, match="widen the band") as caught:
        run = scripted_run(tmp_path, monkeypatch, patterns, [WeightSync(), Rollouts(), Balanced(), RunLedger()])
    assert sum("dropped groups are trained on" in str(one.message) for one in caught) == 1
    for step in run.steps:
        # The one informative group comes first, though it lies outside the band.
        assert names(step.groups)[0] == "p5"
        assert len(step.groups) == 4
        assert len(step.groups) + len(step.dropped) == step.counts["train/prompts"] == 9
        assert (step.metrics["sampling/refills"], step.metrics["sampling/missing"]) == (2, 4)
    assert run.trainer.global_step == 2
    assert (
        json.loads((tmp_path / "lightning_logs" / "version_0" / "summary.json").read_text())["discarded"]["prompts"]
        == 2 * 5
    )


def test_only_uninformative_groups_leave_the_policy_as_it_was(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="too easy or too hard"):
        run = scripted_run(
            tmp_path, monkeypatch, [RIGHT] * 12, [WeightSync(), Rollouts(), DynamicSampling(max_refills=0)]
        )
    assert [len(step.groups) for step in run.steps] == [4, 4]
    assert [step.metrics["grad_norm"] for step in run.steps] == [0, 0]
    fresh = run.module.policy.load().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in run.module.policy_model.state_dict().items())


def test_correctness_decides_not_the_shaped_sum(tmp_path, monkeypatch):
    # Even prompts: equal correctness under differing shaped rewards. Odd: the shape cancels the difference.
    patterns = [RIGHT if i % 2 == 0 else HALF for i in range(20)]
    shapes = [(0, 1, 2, 3) if i % 2 == 0 else (0, 1, 0, 1) for i in range(20)]
    run = scripted_run(
        tmp_path, monkeypatch, patterns, [WeightSync(), Rollouts(), DynamicSampling()], shapes=shapes, steps=1
    )
    (step,) = run.steps
    assert all(int(name[1:]) % 2 for name in names(step.groups))
    assert all(int(name[1:]) % 2 == 0 for name in names(step.dropped))
    assert len(step.groups) == 4
    assert {float(np.ptp(one.rewards)) for one in step.groups} == {0.0}


@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_a_rate_just_at_the_tolerance_of_a_border_passes(rate):
    found = group(prompt(0), [rate - 0.25, rate + 0.25])
    assert found.success_rate == rate
    low, high = rate + REWARD_TOLERANCE, rate - REWARD_TOLERANCE
    assert low - REWARD_TOLERANCE == rate == high + REWARD_TOLERANCE
    assert DynamicSampling(low=low).passes(found) and DynamicSampling(high=high).passes(found)
    assert not DynamicSampling(low=low + REWARD_TOLERANCE).passes(found)
    assert not DynamicSampling(high=high - REWARD_TOLERANCE).passes(found)


def test_a_band_of_one_rate_is_a_band():
    assert DynamicSampling(low=0.5, high=0.5).passes(group(prompt(0), [0, 1]))
