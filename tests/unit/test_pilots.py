"""Which pilots are completed, what a completed group is, and where everything generated is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.engines import RolloutEngine, Sampling, Transformers
from app.update.optimization import Optimization
from callbacks import DynamicSampling, Pilots, ReferenceRollouts, RolloutAhead, RolloutReplay
from callbacks.algorithm.pilot_worth import DECAY, PilotWorth
from datamodules.errors import UserError
from datamodules.seeding import sample_seeds
from datamodules.types import Completion
from tests.support.builders import group, prompt
from tests.support.scripted_run import HALF, QUARTER, RIGHT, WRONG, names, scripted_run
from tests.support.selector_builders import NotingMopps
from tests.support.trainers import trainer_with
from tests.unit.test_transformers_engine import LENGTHS, SEEDS, G, assert_same, build, engine, prompts

NO_FORECAST = float("nan")


def promise(rewards: list[float], forecast: float = NO_FORECAST, rest: int = 4) -> float:
    return PilotWorth().informative(group(prompt(0), rewards), forecast, rest)


@pytest.mark.parametrize(
    ("rewards", "forecast", "rest", "expected"),
    [
        ([0, 1], NO_FORECAST, 4, 1.0),
        # A flat prior: 0 of 4 makes Beta(1, 5), under which four more are wrong with 5/6 6/7 7/8 8/9.
        ([0, 0, 0, 0], NO_FORECAST, 4, 1 - 5 / 9),
        ([1, 1, 1, 1], NO_FORECAST, 4, 1 - 5 / 9),
        ([0, 0, 0, 0], 0.5, 20, 1 - 5 / 25),
        # Beta(0.2, 1.8) has the flat prior's weight and the forecast's mean; two wrong make it Beta(0.2, 3.8).
        ([0, 0], 0.1, 1, 0.2 / 4),
        ([1, 1], 0.1, 1, 1.8 / 4),
        # All scores failed: two more are alike with 1/2 2/3 each way.
        ([], NO_FORECAST, 2, 1 - 2 / 3),
        # Graded, equal, neither right nor wrong: nobody knows.
        ([0.5, 0.5], NO_FORECAST, 4, 1.0),
    ],
)
def test_the_promise_of_a_pilot_by_hand(rewards: list[float], forecast: float, rest: int, expected: float) -> None:
    assert promise(rewards, forecast, rest) == pytest.approx(expected)


def test_prior_and_price_are_learnt_from_recent_pilots() -> None:
    worth = PilotWorth()
    assert worth.threshold(4) == 0
    # Pilots of two: all right; all wrong; the third was completed. The price counts every completion.
    groups = [group(prompt(0), [1, 1]), group(prompt(1), [0, 0]), group(prompt(2), [0, 1, 1, 1])]
    worth.learn(groups, np.array([0.5, 0.5, 0.5]), pilot=2)
    assert worth.threshold(2) == pytest.approx(2 * 1 / 8)
    # (r - m)^2 - m (1 - m) / 2 = 1/8, 1/8, -1/8; m (1 - m) / 2 = 1/8 each.
    rho = (1 / 6 + 1 / 8) / (1 / 2 + 3 / 8)
    weight = 1 / rho - 1
    assert worth.informative(group(prompt(3), [0, 0]), 0.5, 1) == pytest.approx((weight / 2) / (weight + 2))
    # Without a forecast the mean: of 1, 0 and 1/2 beside two pilots of mean 1/2.
    worth.learn([group(prompt(4), [1, 1])], np.array([NO_FORECAST]), pilot=2)
    assert worth.mean(NO_FORECAST) == pytest.approx((1 + 1 + 0 + 0.5 + 1) / 6)
    before = worth.state_dict()
    worth.begin_step()
    assert worth.state_dict() == {name: DECAY * value for name, value in before.items()}
    assert worth.threshold(100) == 1  # an informative pilot is always completed


# The script begins again in the second call: the rest of a group scores what its pilot does.
PATTERNS = [HALF if i % 3 == 0 else RIGHT if i % 3 == 1 else QUARTER for i in range(24)]


def test_a_completed_group_is_the_whole_one_and_others_are_dropped_and_counted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector, options = NotingMopps(), {"steps": 1, "prompts_per_step": 12}
    pilots = Pilots(n_init=2, rule="informative")
    (step,) = scripted_run(tmp_path, monkeypatch, PATTERNS, [pilots], selector=selector, **options).steps
    (whole,) = scripted_run(tmp_path, monkeypatch, PATTERNS, [], selector=NotingMopps(), **options).steps
    assert step.prompts == whole.prompts
    of = {one.prompt.id: one for one in whole.groups}
    half = [name for name in step.prompts if int(name[1:]) % 3 == 0]
    assert 1 < len(half) < 11
    assert names(step.groups) == half and sorted(names(step.groups + step.dropped)) == sorted(step.prompts)
    for one in (*step.groups, *step.dropped):
        kept = len(one.completions)
        assert kept == (4 if one.prompt.id in half else 2)
        assert_same(one.completions, of[one.prompt.id].completions[:kept])
    assert [one.correctness.tolist() for one in step.groups] == [[1, 0, 1, 0]] * len(half)
    lost = len(step.dropped)
    assert step.counts["train/prompts"] == 12
    assert step.counts["train/completions"] == 48 - 2 * lost == step.counts["rewards/completions"]
    assert step.counts["train/tokens"] == sum(one.completion_tokens for one in step.groups + step.dropped)
    assert (step.counts["discarded/prompts"], step.counts["discarded/completions"]) == (lost, 2 * lost)
    assert step.metrics["pilot/saved_completions"] == 2 * lost
    assert step.metrics["pilot/completed_fraction"] == pytest.approx(len(half) / 12)
    assert step.metrics["pilot/threshold"] == 1
    tokens = [sum(one.completion_tokens for one in its) for its in (step.dropped, step.groups + step.dropped)]
    assert step.metrics["time/pilots_dropped"] == pytest.approx(
        step.metrics["time/rollout"] * tokens[0] / tokens[1], rel=0.05
    )
    # The selector sees every prompt once, with the completions that it had.
    (seen,) = selector.seen
    assert dict(zip(seen.prompt_ids, seen.samples.tolist(), strict=True)) == {
        name: 4 if name in half else 2 for name in step.prompts
    }
    assert dict(zip(seen.prompt_ids, seen.success_rate.tolist(), strict=True)) == {
        name: 0.5 if name in half else float(int(name[1:]) % 3 == 1) for name in step.prompts
    }


def test_silent_pilots_are_completed_while_they_promise_enough(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing is known in the first step. Afterwards 20 of 24 prompts have proved to be hopeless.
    patterns = [HALF if i % 6 == 0 else WRONG for i in range(24)]
    pilots = Pilots(n_init=2)
    run = scripted_run(tmp_path, monkeypatch, patterns, [pilots], steps=3, prompts_per_step=24)
    first, second, third = run.steps
    assert (len(first.groups), first.metrics["pilot/threshold"]) == (24, 0)
    assert first.metrics["pilot/saved_completions"] == 0
    # 4 of 96 completions' groups were informative, so that two more are worth it from 2 x 4 / 96.
    assert second.metrics["pilot/threshold"] == pytest.approx(2 * 4 / 96)
    assert 0 < third.metrics["pilot/threshold"] < 0.5
    for step in (second, third):
        assert {name for name in names(step.groups) if int(name[1:]) % 6 == 0} == {"p0", "p6", "p12", "p18"}
        silent = len(step.groups) - 4
        assert step.counts["train/completions"] == 48 + 2 * (4 + silent)
    # Chances differ by the prior alone, so that either all silent pilots are worth it or none is.
    assert {len(second.groups), len(third.groups)} <= {4, 24}
    state = pilots.state_dict()
    other = Pilots(n_init=2)
    other.load_state_dict(state)
    assert other.state_dict() == state


def test_dynamic_sampling_refills_by_pilots_and_replay_fills_the_rest(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pilots = Pilots(n_init=2, rule="informative")
    run = scripted_run(tmp_path, monkeypatch, PATTERNS, [pilots, DynamicSampling()])
    for step in run.steps:
        assert len(step.groups) == 4 and step.metrics["sampling/missing"] == 0
        dropped = len(step.dropped)
        assert step.metrics["sampling/refills"] > 0 < dropped
        assert step.metrics["sampling/dropped_fraction"] == pytest.approx(dropped / (4 + dropped))
        assert step.counts["train/completions"] == 4 * 4 + 2 * dropped
        assert step.counts["discarded/completions"] == 2 * dropped
        assert step.metrics["pilot/saved_completions"] == 2 * dropped
    replay = RolloutReplay(fresh_fraction=1.0, capacity=8)
    steps = scripted_run(
        tmp_path, monkeypatch, [HALF] * 4 + [WRONG] * 20, [Pilots(2, "informative"), replay], steps=4,
        prompts_per_step=12,
    ).steps  # fmt: skip
    for step in steps:
        assert {one.source for one in step.groups if one.prompt.id not in step.prompts} <= {"replay"}
    assert any(one.source == "replay" for step in steps for one in step.groups)


@pytest.mark.parametrize(
    "options", [{}, {"max_rows": 5}, {"max_rows": 2}, {"max_rows": 9, "share_prompts": False}, {"prefill_tokens": 20}]
)
def test_the_engine_completes_groups_while_it_decodes_others(options: dict[str, int]) -> None:
    model, batch, sampling = build("qwen2"), prompts([*LENGTHS, 3]), Sampling(G, 16)
    batch[-1] = batch[0]  # an equal prompt is read with it
    seeds = np.concatenate([SEEDS, SEEDS[-1:] + 100])
    whole = engine(model).generate(batch, sampling, seeds)
    for pilot, chosen in ((2, {1, 3, 5}), (1, set(range(6))), (3, set())):
        asked: dict[int, tuple[Completion, ...]] = {}

        def completed(pilots: Any, asked: Any = asked, chosen: Any = chosen) -> list[int]:
            assert not asked.keys() & pilots.keys()
            asked.update(pilots)
            return [place for place in pilots if place in chosen]

        for own in (True, False):
            asked.clear()
            its = engine(model, **options)
            generate = its.generate_with_pilots if own else RolloutEngine.generate_with_pilots.__get__(its)
            found = generate(batch, sampling, seeds, pilot, completed)
            assert sorted(asked) == list(range(6))
            for place, (left, right) in enumerate(zip(found, whole, strict=True)):
                assert len(left) == (G if place in chosen else pilot)
                assert_same(left, right[: len(left)])
                assert_same(asked[place], right[:pilot])
    assert engine(model).generate_with_pilots([], sampling, seeds[:0], 2, lambda pilots: []) == []


def test_pilots_ahead_share_a_call_with_the_groups_of_the_step_before(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    generate = Transformers.generate

    def noting(engine: Transformers, given: Any, *rest: Any) -> Any:
        asked.append(sorted({one.id for one in given}))
        return generate(engine, given, *rest)

    monkeypatch.setattr(Transformers, "generate", noting)
    selector, pilots = NotingMopps(), Pilots(2, "informative", ahead=True)
    run = scripted_run(tmp_path, monkeypatch, PATTERNS, [pilots], selector=selector, steps=4, prompts_per_step=6)
    others = run.steps[1:]
    # The first step generates its own groups by another method, and the pilots of the second.
    assert asked[0] == sorted(others[0].prompts) and len(asked) == 4
    for place, (step, before) in enumerate(zip(others, run.steps, strict=False), start=1):
        half = [name for name in step.prompts if int(name[1:]) % 3 == 0]
        assert names(step.groups) == half and sorted(names(step.groups + step.dropped)) == sorted(step.prompts)
        assert not set(step.prompts) & set(before.prompts)
        coming = run.steps[place + 1].prompts if place < 3 else []
        assert asked[place] == sorted({*half, *coming})
        for one in (*step.groups, *step.dropped):
            assert one.birth_step == place - 1
            versions = [its.policy_version for its in one.completions]
            assert versions == ([place - 1] * 2 + [place] * 2 if one.prompt.id in half else [place - 1] * 2)
        rewards = [one.correctness.tolist() for one in step.groups]
        assert rewards == [[1, 0, 1, 0]] * len(half)
        assert step.counts["train/completions"] == 2 * len(half) + 2 * len(coming)
        assert step.counts["train/prompts"] == len(coming)
        assert step.metrics["pilot/saved_completions"] == 2 * len(step.dropped)
        assert step.counts["discarded/completions"] == 2 * len(step.dropped)
    # Every prompt is observed once, with the completions that it had.
    for step in run.steps:
        for one in (*step.groups, *step.dropped):
            its = [dict(zip(seen.prompt_ids, seen.samples.tolist(), strict=True)) for seen in selector.seen]
            assert len(one.completions) in [seen[one.prompt.id] for seen in its if one.prompt.id in seen]
    assert sum(len(seen.prompt_ids) for seen in selector.seen) == sum(len(step.prompts) for step in run.steps)


def test_pilots_ahead_need_two_steps_of_prompts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"has 5 prompts and two steps have 6\. Lower data\.prompts_per_step"):
        scripted_run(tmp_path, monkeypatch, [HALF] * 5, [Pilots(2, ahead=True)], prompts_per_step=3)


@pytest.mark.parametrize("rate", [1e-30, 1e-3])
def test_the_tokens_of_pilots_ahead_are_those_of_the_policy_of_their_time(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, rate: float
) -> None:
    options = {"steps": 3, "prompts_per_step": 6, "optimization": Optimization(learning_rate=rate)}
    run = scripted_run(tmp_path, monkeypatch, [HALF] * 24, [Pilots(2, "informative", ahead=True)], **options)
    moved = [step.metrics["sampling/sampling_logp_difference/mean"] for step in run.steps]
    assert moved[0] < 1e-5
    if rate == 1e-3:  # half of the tokens are those of the policy before the last update
        assert min(moved[1:]) > 1e-3
        assert all(abs(step.metrics["sampling/importance_sampling_ratio/mean"] - 1) > 1e-5 for step in run.steps[1:])
        return
    assert max(moved) < 1e-5
    for number, step in enumerate(run.steps):
        for one in step.groups:
            seeds = sample_seeds(0, "train", number, [one.prompt.id], 4)
            (whole,) = run.module.engine.generate([one.prompt], run.module.sampling, seeds)
            for ours, theirs in zip(one.completions, whole, strict=True):
                assert ours.token_ids.tolist() == theirs.token_ids.tolist()
                np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-5)


def check(pilots: Pilots, *others: Any) -> None:
    module: Any = type("Module", (), {"sampling": Sampling(num_generations=8)})
    pilots.check(trainer_with(callbacks=[pilots, *others]), module, module)


def test_what_cannot_be_combined_is_refused() -> None:
    check(Pilots(7), RolloutAhead(staleness=0), ReferenceRollouts(), DynamicSampling(), RolloutReplay())
    for others, told in (
        (
            [RolloutAhead()],
            r"callbacks\.RolloutAhead generates whole groups .* Remove one of the two, or set staleness=0",
        ),
        ([ReferenceRollouts(with_training=True)], r"with_training=true.*Set with_training=false"),
    ):
        with pytest.raises(UserError, match=told):
            check(Pilots(), *others)
    with pytest.raises(UserError, match=r"Pilots has ahead=true and callbacks\.RolloutAhead is listed"):
        check(Pilots(ahead=True), RolloutAhead(staleness=0))
    with pytest.raises(UserError, match=r"n_init=8, but model\.sampling\.num_generations is 8"):
        check(Pilots(8))
    with pytest.raises(UserError, match="n_init is 1, expected at least 2"):
        Pilots(1)
    with pytest.raises(UserError, match=r"'inform'; .*informative"):
        Pilots(rule="inform")  # type: ignore[arg-type]
