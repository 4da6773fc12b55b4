"""Borders of the callbacks that make up the algorithm: when they act, what they observe and what a resume restores."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from app.engines import Sampling, Transformers
from app.engines.ahead import Ahead, Groups
from app.policy.weights import plain_weights
from app.rollouts.pipeline import RolloutRequest
from callbacks import (
    Balanced,
    CompletionsLog,
    DynamicSampling,
    ReferenceRollouts,
    RolloutAhead,
    RolloutReplay,
    Rollouts,
    RunCheckpoint,
    RunLedger,
    SelectionMonitor,
    ShardedPolicy,
    StartValidation,
    WeightSync,
)
from callbacks.stages import Stage, StepCallback
from callbacks.standard import with_standard
from datamodules.errors import UserError
from datamodules.ledger import Ledger, WeightedMean
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from datamodules.selectors import SelectionContext
from datamodules.types import Prompt, RolloutGroup, TrainBatch
from tests.support.builders import group, pool, prompt
from tests.support.policies import tiny_model
from tests.support.scripted_run import HALF, QUARTER, RIGHT, WRONG, scripted_run
from tests.support.selector_builders import NotingMopps, NotingUniform, saved_and_loaded
from tests.support.trainers import MODULE, trainer_with

MIXED = [HALF, QUARTER, RIGHT, WRONG] * 3


class NotingEngine(Transformers):
    """The policy as its own engine, which notes its pushes; it seems to generate ahead by doing so at once."""

    runs_ahead = True

    def __init__(self) -> None:
        super().__init__()
        self.acts: list[tuple[str, Any]] = []
        self.pushed: list[dict[str, torch.Tensor]] = []

    def settle(self) -> None:
        self.acts.append(("settle", None))

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        self.acts.append(("push", (version, since)))
        self.pushed.append({name: tensor.clone() for name, tensor in named_tensors})
        super().push([], version, since)

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Ahead:
        self.acts.append(("start", [one.id for one in prompts]))
        groups: Groups = self.generate(prompts, sampling, seeds)
        future: Future[float] = Future()
        future.set_result(100.0)
        return Ahead(future, lambda error: groups)


def test_the_weights_of_every_update_are_pushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = NotingEngine()
    run = scripted_run(tmp_path, monkeypatch, MIXED, [WeightSync(), Rollouts()], steps=2, engine=engine)
    # Before the first rollout, and after each of the two updates, when what was begun before is over.
    assert engine.acts == [
        ("push", (0, None)), ("settle", None), ("push", (1, None)), ("settle", None), ("push", (2, None)),
    ]  # fmt: skip
    final = dict(plain_weights(run.module.policy_model))
    assert [list(one) for one in engine.pushed] == [list(final)] * 3
    assert all(torch.equal(engine.pushed[2][name], tensor) for name, tensor in final.items())
    for earlier, later in ((0, 1), (1, 2)):
        assert any(not torch.equal(engine.pushed[earlier][name], engine.pushed[later][name]) for name in final)
    assert [{one.policy_version for found in step.groups for one in found.completions} for step in run.steps] == [
        {0}, {1},
    ]  # fmt: skip
    assert all(step.metrics["time/sync"] > 0 for step in run.steps)


def test_after_the_first_push_adapters_send_only_what_they_change() -> None:
    model: Any = get_peft_model(tiny_model(16, seed=0), LoraConfig(r=2, target_modules=["q_proj"]))
    engine, sync, batch = NotingEngine(), WeightSync(), TrainBatch(0, ())
    module: Any = SimpleNamespace(policy_model=model, pipeline=SimpleNamespace(engine=engine))

    def trainer(updates: int) -> Any:
        return SimpleNamespace(global_step=updates)

    sync.on_train_start(trainer(4), module)  # a resumed run
    sync.on_train_batch_end(trainer(5), module, None, batch, 0)
    sync.on_train_batch_end(trainer(7), module, None, batch, 1)
    sync.on_train_start(trainer(7), module)  # another call of fit, whose engine has been set up again
    assert [given for act, given in engine.acts if act == "push"] == [(4, None), (5, 4), (7, 5), (7, None)]
    whole, changing = list(dict(plain_weights(model))), list(dict(plain_weights(model, changing=True)))
    assert 0 < len(changing) < len(whole)
    assert [list(one) for one in engine.pushed] == [whole, changing, changing, whole]
    assert batch.ledger.seconds.keys() == {"rollout", "sync"}


def test_a_validation_of_single_prompts_is_checked_from_the_second_on() -> None:
    checked: list[tuple[float, str]] = []

    def roll(prompts: Sequence[Prompt], sampling: Sampling, ledger: Ledger, **given: Any) -> list[RolloutGroup]:
        assert given == {"purpose": "validate", "step": 0, "source": "fresh"}
        ledger.count("validate/prompts", len(prompts))
        return [group(one, [0, 1]) for one in prompts]

    def check(ledger: Ledger, where: str) -> None:
        checked.append((ledger.counts["validate/prompts"], where))

    data = OnlinePromptDataModule(PromptFile("unread.jsonl"), val=PromptFile("unread.jsonl"))
    trainer: Any = SimpleNamespace(datamodule=data)
    module: Any = SimpleNamespace(
        pipeline=SimpleNamespace(roll=roll, stop_if_a_reward_fails=check),
        measured_set=lambda number: "val",
        sampling_of=lambda measured: Sampling(2, 3),
    )
    rollouts = Rollouts()
    for _ in range(2):  # the second validation begins from nothing
        checked.clear()
        rollouts.on_validation_start(trainer, module)
        for number in range(3):
            batch = TrainBatch(number, [prompt(number)])
            rollouts.on_validation_batch_start(trainer, module, batch, number)
            assert [one.prompt.id for one in batch.groups] == [f"p{number}"]
        rollouts.on_validation_epoch_end(trainer, module)
        assert checked == [(2, "Validation"), (3, "Validation"), (3, "Validation")]


def test_references_are_rolled_out_before_the_run_and_every_few_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector, references = NotingMopps(), ReferenceRollouts(size=5, every=2, reuse="discard")
    callbacks = [WeightSync(), references, Rollouts(), RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, MIXED, callbacks, selector=selector, steps=5)
    rate = {f"p{i}": float(np.mean(scores)) for i, scores in enumerate(MIXED)}
    seen = zip(selector.seen, selector.expected, strict=True)
    sets = [(outcomes, forecast) for outcomes, forecast in seen if outcomes.source == "reference"]
    # Step 4 begins with the set rolled out after step 3. No set is rolled out for a step 5.
    assert [outcomes.step for outcomes, _ in sets] == [0, 2, 4]
    assert [step.counts["reference/prompts"] for step in run.steps] == [5, 5, 0, 5, 0]  # counted where they ran
    for (outcomes, forecast), number in zip(sets, (0, 2, 4), strict=True):
        metrics, ids = run.steps[number].metrics, list(outcomes.prompt_ids)
        assert forecast is not None
        expected, found = forecast[[int(one[1:]) for one in ids]], np.array([rate[one] for one in ids])
        assert len(set(ids)) == 5 and list(outcomes.success_rate) == list(found)
        assert metrics["difficulty/reference_success"] == pytest.approx(found.mean())
        assert metrics["difficulty/reference_informative_fraction"] == np.mean((found > 0) & (found < 1))
        assert metrics["difficulty/reference_brier"] == pytest.approx(np.mean((expected - found) ** 2))
        if number:  # before any outcome all forecasts are the same
            assert metrics["difficulty/reference_pearson"] == pytest.approx(np.corrcoef(expected, found)[0, 1])
    for number in (1, 3):
        assert not any(name.startswith("difficulty/reference") for name in run.steps[number].metrics)
    assert not any(one.source == "reference" for step in run.steps for one in (*step.groups, *step.surplus))


class Calls(Transformers):
    """Notes the prompts of every call, each of which takes a while more than it has work."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> Groups:
        self.calls.append([one.id for one in prompts])
        time.sleep(0.1)
        return super().generate(prompts, sampling, seeds)


def test_references_are_rolled_out_in_one_call_with_training_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector, engine = NotingMopps(), Calls()
    references = ReferenceRollouts(size=5, every=2, with_training=True)
    callbacks = [WeightSync(), references, Rollouts(), RolloutReplay(fresh_fraction=1.0, admit="all"), RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, MIXED, callbacks, selector=selector, steps=5, engine=engine)
    rate = {f"p{i}": float(np.mean(scores)) for i, scores in enumerate(MIXED)}
    sets = {one.step: one for one in selector.seen if one.source == "reference"}
    fresh = {one.step: one for one in selector.seen if one.source == "fresh"}
    # The first set precedes the first choice; no set is rolled out with the last step, which no choice follows.
    assert list(sets) == [0, 2]
    assert all(one.success_rate.tolist() == [rate[name] for name in one.prompt_ids] for one in sets.values())
    assert all(len(set(one.prompt_ids)) == 5 for one in sets.values())
    chosen, shown = run.steps[2].prompts, sets[2].prompt_ids
    others, both = [name for name in shown if name not in chosen], set(shown) & set(chosen)
    assert both  # else this run would not show that they are rolled out once
    assert engine.calls[0] == list(sets[0].prompt_ids)
    assert engine.calls[2:] == [run.steps[1].prompts, [*chosen, *others], run.steps[3].prompts, run.steps[4].prompts]
    # No outcome is observed twice, the references come first, and the choice of the step was made without them.
    assert set(fresh[2].prompt_ids) == set(chosen) - both
    seen = [(one.step, one.source) for one in selector.seen if one.prompt_ids]
    assert seen == [(0, "reference"), (0, "fresh"), (1, "fresh"), (2, "reference"), (2, "fresh"), *seen[5:]]
    step = run.steps[2]
    assert [one.prompt.id for one in step.groups] == chosen and {one.source for one in step.groups} == {"fresh"}
    assert [one.prompt.id for one in step.surplus] == others and {one.source for one in step.surplus} == {"reference"}
    assert {one.birth_step for one in (*step.groups, *step.surplus)} == {2}
    assert (step.counts["train/prompts"], step.counts["reference/prompts"]) == (4, len(others))
    assert step.counts["reference/tokens"] == sum(one.completion_tokens for one in step.surplus)
    assert step.metrics["difficulty/reference_success"] == pytest.approx(np.mean([rate[name] for name in shown]))
    assert not any(name.startswith("difficulty/reference") for name in run.steps[3].metrics)


def test_one_call_for_two_purposes_is_the_two_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, tuple[list[list[RolloutGroup]], Ledger]] = {}

    class Both(StepCallback):
        stage = Stage.WATCH

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: TrainBatch, batch_idx: int) -> None:
            prompts = [trainer.datamodule.pools["train"][position] for position in range(9)]
            requests = [RolloutRequest(prompts[:3], "train"), RolloutRequest(prompts[3:], "reference", "reference")]
            for name in ("apart", "together"):
                ledger, sampling = Ledger(), pl_module.sampling
                if name == "together":
                    groups = pl_module.pipeline.roll_together(requests, sampling, ledger, step=7)
                else:
                    groups = [
                        pl_module.pipeline.roll(
                            one.prompts, sampling, ledger, purpose=one.purpose, step=7, source=one.source
                        )
                        for one in requests
                    ]
                found[name] = groups, ledger

    engine = Calls()
    scripted_run(tmp_path, monkeypatch, MIXED, [WeightSync(), Rollouts(), Both()], steps=1, engine=engine)
    (apart, ledger), (together, shared) = found["apart"], found["together"]
    assert len(engine.calls) == 1 + 2 + 1
    assert [len(one) for one in together] == [3, 6]
    for left, right in zip([*apart[0], *apart[1]], [*together[0], *together[1]], strict=True):
        assert (left.prompt.id, left.source, left.birth_step) == (right.prompt.id, right.source, right.birth_step)
        np.testing.assert_array_equal(left.correctness, right.correctness)
        for a, b in zip(left.completions, right.completions, strict=True):
            np.testing.assert_array_equal(a.token_ids, b.token_ids)
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert dict(shared.counts) == dict(ledger.counts) and shared.reward_metrics == ledger.reward_metrics
    tokens = [shared.counts[f"{purpose}/tokens"] for purpose in ("train", "reference")]
    assert tokens == [sum(one.completion_tokens for one in groups) for groups in together]
    call = shared.seconds["rollout"] * sum(tokens) / tokens[0]
    assert 0.1 < call < 0.1 + sum(shared.seconds.values())
    assert shared.seconds["reference"] > call * tokens[1] / sum(tokens)  # and its scoring


def test_references_cannot_share_the_call_of_prompts_rolled_out_ahead() -> None:
    module, data = SimpleNamespace(environment=None), MODULE
    for with_training, staleness in ((True, 1), (False, 1), (True, 0)):
        ahead = RolloutAhead(staleness=staleness)
        trainer = trainer_with(callbacks=[ReferenceRollouts(with_training=with_training), ahead])
        if with_training and staleness:
            with pytest.raises(UserError, match=r"with_training=true, but callbacks\.RolloutAhead"):
                ahead.check(trainer, module, data)
        else:
            ahead.check(trainer, module, data)


@pytest.mark.parametrize(("updates", "limit", "rolled"), [(3, 4, True), (4, 4, False), (5, 4, False), (9, -1, True)])
def test_no_references_are_rolled_out_after_the_last_update(updates: int, limit: int, rolled: bool) -> None:
    references, _ = on_data(ReferenceRollouts(size=2, every=3))
    purposes: list[tuple[str, int]] = []

    def roll(prompts: Sequence[Prompt], *_: Any, purpose: str, step: int, source: str) -> list[RolloutGroup]:
        purposes.append((purpose, step))
        return [group(one, [0, 1], birth=step, source="reference") for one in prompts]

    module: Any = SimpleNamespace(sampling=None, pipeline=SimpleNamespace(roll=roll))
    for step in range(4):
        trainer: Any = SimpleNamespace(global_step=updates, max_steps=limit)
        references.on_train_batch_end(trainer, module, None, TrainBatch(step, ()), step)
    assert purposes == ([("reference", 3)] if rolled else [])


def test_a_restored_reference_set_is_offered_once_and_not_rolled_out_again() -> None:
    references, data = on_data(ReferenceRollouts(size=3, every=2))
    rolled: list[int] = []

    def roll(prompts: Sequence[Prompt], *_: Any, step: int, **__: Any) -> list[RolloutGroup]:
        rolled.append(step)
        return [group(one, [0, 1], birth=step, source="reference") for one in prompts]

    module: Any = SimpleNamespace(sampling=None, pipeline=SimpleNamespace(roll=roll))
    trainer: Any = SimpleNamespace(
        global_step=0, max_steps=9, datamodule=data,
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=5)),
    )  # fmt: skip
    references.on_train_start(trainer, module)  # resumed without a set
    assert rolled == [6]
    again = ReferenceRollouts(size=3, every=2)
    again.setup(trainer, module, "fit")
    again.load_state_dict(saved_and_loaded(references.state_dict()))
    again.on_train_start(trainer, module)
    assert rolled == [6]
    for one in (references, again):
        chosen = data.pools["train"].ids
        batch = TrainBatch(6, [data.pools["train"][i] for i in range(3)])
        one.on_train_batch_start(trainer, module, batch, 6)
        ids = [found.prompt.id for found, _ in batch.rollouts]
        assert len(ids) == 3 and all(found.birth_step == 6 for found, _ in batch.rollouts)
        assert {found.prompt.id for found in batch.groups} == set(ids) & set(chosen[:3])
        assert batch.metrics["difficulty/reference_success"] == 0.5
        assert batch.reference_forecast is None
        second = TrainBatch(7, [data.pools["train"][i] for i in range(3)])
        one.on_train_batch_start(trainer, module, second, 7)
        assert not second.rollouts and not second.metrics and not second.ledger.seconds
    forecast = np.array([[0.25, 0.5], [0.75, 1.0]])
    references._forecast = forecast
    again.load_state_dict(saved_and_loaded(references.state_dict()))
    batch = TrainBatch(8, ())
    again.on_train_batch_start(trainer, module, batch, 8)
    np.testing.assert_array_equal(batch.reference_forecast, forecast)


@pytest.mark.parametrize("options", [{"size": 1}, {"every": 0}, {"size": 1, "every": 0}])
def test_reference_sets_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected size >= 2 and every >= 1"):
        ReferenceRollouts(**options)  # type: ignore[arg-type]
    ReferenceRollouts(size=2, every=1)


def on_data(callback: Any, size: int = 8) -> tuple[Any, OnlinePromptDataModule]:
    """Set up a callback on a data module whose pool is in memory."""
    data = OnlinePromptDataModule(PromptFile("unread.jsonl"), prompts_per_step=3, seed=0)
    data.pools["train"] = pool(size)
    data.selector.setup(data.pools["train"], SelectionContext(0))
    engine = SimpleNamespace(runs_ahead=True)
    callback.setup(SimpleNamespace(datamodule=data, world_size=1), SimpleNamespace(engine=engine), "fit")
    return callback, data


def test_the_next_step_is_rolled_out_during_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, selector, ledger = NotingEngine(), NotingUniform(), RunLedger()
    callbacks = [WeightSync(), Rollouts(), RolloutAhead(), ledger]
    run = scripted_run(tmp_path, monkeypatch, MIXED, callbacks, selector=selector, steps=3, engine=engine)
    first, second, third = (step.prompts for step in run.steps)
    assert [(act, given) for act, given in engine.acts if act != "settle"] == [
        ("push", (0, None)), ("start", second), ("push", (1, None)), ("start", third), ("push", (2, None)),
        ("push", (3, None)),
    ]  # fmt: skip
    # What is rolled out ahead is shown with the step whose policy made it.
    assert [(one.step, list(one.prompt_ids)) for one in selector.seen if one.prompt_ids] == [
        (0, first), (0, second), (1, third),
    ]  # fmt: skip
    for step, ids, version in zip(run.steps, (first, second, third), (0, 0, 1), strict=True):
        assert [one.prompt.id for one in step.groups] == ids
        assert {one.birth_step for one in step.groups} == {version}
        assert {one.policy_version for found in step.groups for one in found.completions} == {version}
        assert step.counts["train/prompts"] == 4
    assert ["time/rollout_overlapped" in step.metrics for step in run.steps] == [True, True, False]
    assert run.steps[0].metrics["time/rollout_overlapped"] == pytest.approx(100, abs=1)
    assert ledger.total.counts["overlapped_seconds"] == pytest.approx(200, abs=2)


@pytest.mark.parametrize(("updates", "limit", "starts"), [(0, 4, True), (1, 4, True), (2, 4, False), (7, -1, True)])
def test_nothing_is_rolled_out_for_a_step_that_does_not_come(updates: int, limit: int, starts: bool) -> None:
    ahead, data = on_data(RolloutAhead())
    started: list[tuple[int, int]] = []
    pipeline = SimpleNamespace(start=lambda flights, sampling, limits, step: started.append((len(flights), step)))
    module: Any = SimpleNamespace(mini_batches=2, sampling=Sampling(2, 3), pipeline=pipeline)
    trainer: Any = SimpleNamespace(global_step=updates, max_steps=limit)
    ahead.on_train_batch_start(trainer, module, TrainBatch(5, ()), 5)
    assert started == ([(3, 5)] if starts else [])
    assert (data.prepared is not None) is starts
    if starts:
        data.prepared, data.fresh_prompts = None, 0  # the buffer fills the whole batch
        ahead.on_train_batch_start(trainer, module, TrainBatch(6, ()), 6)
        assert started == [(3, 5)]


def test_a_step_without_rollouts_ahead_ends_without_any() -> None:
    ahead, data = on_data(RolloutAhead())
    batch, module, trainer = TrainBatch(5, ()), SimpleNamespace(mini_batches=1), SimpleNamespace()
    data.prepared = TrainBatch(6, ())  # restored, but nothing was begun
    ahead.on_train_batch_end(trainer, module, None, batch, 5)
    assert not data.prepared.groups and not batch.metrics


def prepared(data: OnlinePromptDataModule) -> TrainBatch:
    batch = TrainBatch(7, [prompt(i) for i in (4, 2, 6)], np.array([0.25, 0.5, 0.75]))
    batch.pool_forecast = np.linspace(0, 1, 8)
    batch.add([group(prompt(i), scores, birth=6) for i, scores in ((4, [0, 1]), (2, [1, 1]), (6, [0, 0, 1]))])
    batch.explored = frozenset({"p2", "p6"})
    batch.ledger.seconds.update(select=1.5, rollout=2.5)
    batch.ledger.count("train/prompts", 3)
    batch.ledger.average("exact/length", WeightedMean(6.0, 4.0))
    data.prepared = batch
    return batch


def test_a_batch_made_ahead_is_restored_whole() -> None:
    ahead, data = on_data(RolloutAhead())
    assert ahead.state_dict() == {}
    ahead.load_state_dict({})
    assert data.prepared is None
    batch = prepared(data)
    state = saved_and_loaded(ahead.state_dict())
    again, other = on_data(RolloutAhead())
    again.load_state_dict(state)
    found = other.next_batch(7)
    assert other.prepared is None and found.step == 7
    assert [one.id for one in found.prompts] == ["p4", "p2", "p6"]
    np.testing.assert_array_equal(found.forecast, batch.forecast)
    np.testing.assert_array_equal(found.pool_forecast, batch.pool_forecast)
    assert [(one.prompt.id, one.birth_step, list(one.rewards)) for one in found.groups] == [
        ("p4", 6, [0, 1]), ("p2", 6, [1, 1]), ("p6", 6, [0, 0, 1]),
    ]  # fmt: skip
    assert found.explored == {"p2", "p6"}
    assert found.ledger.seconds == {"select": 1.5, "rollout": 2.5} and found.ledger.counts == {"train/prompts": 3}
    assert found.ledger.reward_metrics == {"exact/length": WeightedMean(6.0, 4.0)}
    batch.forecast = batch.pool_forecast = None
    again.load_state_dict(saved_and_loaded(ahead.state_dict()))
    assert other.prepared is not None
    assert other.prepared.forecast is None and other.prepared.pool_forecast is None


@pytest.mark.parametrize(("now", "trained", "surplus"), [(1, ["p4"], ["p2", "p6"]), (2, ["p4", "p2"], ["p6"])])
def test_a_resumed_run_of_fewer_prompts_keeps_the_first(now: int, trained: list[str], surplus: list[str]) -> None:
    ahead, data = on_data(RolloutAhead())
    prepared(data)
    state = ahead.state_dict()
    data.prompts_per_step = now
    ahead.load_state_dict(state)
    found = data.prepared
    assert found is not None and found.forecast is not None
    assert [one.id for one in found.prompts] == [one.prompt.id for one in found.groups] == trained
    assert [one.prompt.id for one in found.of("surplus")] == surplus
    assert list(found.forecast) == [0.25, 0.5][:now]


def test_a_resumed_run_of_more_prompts_chooses_the_rest() -> None:
    ahead, data = on_data(RolloutAhead())
    prepared(data)
    state = ahead.state_dict()
    data.prompts_per_step = 5
    data.selector.choose(3)  # a step has begun, in which more prompts can be added
    ahead.load_state_dict(state)
    found = data.prepared
    assert found is not None
    assert [one.id for one in found.prompts[:3]] == ["p4", "p2", "p6"] and len(found.prompts) == 5
    assert len(found.groups) == 3
    del state["prompts_per_step"]  # of an earlier version
    ahead.load_state_dict(state)
    assert data.prepared is not None and len(data.prepared.prompts) == 3


def test_rollouts_ahead_need_an_engine_of_its_own() -> None:
    module: Any = SimpleNamespace(engine=Transformers())
    trainer: Any = SimpleNamespace(datamodule=OnlinePromptDataModule(PromptFile("unread.jsonl")))
    with pytest.raises(UserError, match=r"callbacks\.RolloutAhead is used with engines\.Transformers"):
        RolloutAhead().setup(trainer, module, "fit")


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [
        (Balanced, {"low": 0.3, "high": 0.7, "max_refills": 10}),
        (DynamicSampling, {"low": None, "high": None, "max_refills": 10}),
        (ReferenceRollouts, {"size": 256, "every": 2, "reuse": "train", "with_training": False}),
        (RolloutReplay, {"fresh_fraction": 0.5, "capacity": 512, "admit": "informative"}),
        (RunCheckpoint, {"every": 10, "keep": 2, "keep_best": None, "on_write_error": "continue"}),
        (CompletionsLog, {"every": 10, "samples": 4}),
        (SelectionMonitor, {"histograms_every": 10, "pictures_every": 20}),
        (StartValidation, {"enabled": True}),
        (ShardedPolicy, {"shard_size": 0, "reduce_dtype": "float32", "reshard_after_forward": True}),
    ],
    ids=lambda one: one.__name__ if isinstance(one, type) else "",
)
def test_a_config_that_says_nothing_keeps_its_meaning(kind: type[StepCallback], defaults: dict[str, object]) -> None:
    callback = kind()
    assert {name: getattr(callback, name) for name in defaults} == defaults


class OwnReplay(RolloutReplay):
    """A user's own."""


def test_a_callback_is_listed_once() -> None:
    for pair in ([RolloutReplay(), RolloutReplay()], [OwnReplay(), RolloutReplay()], [RolloutReplay(), OwnReplay()]):
        with pytest.raises(UserError, match=r"lists callbacks\.\w*Replay more than once"):
            with_standard(pair)
    listed = [OwnReplay(), RunCheckpoint(dirpath="a"), RunCheckpoint(dirpath="b")]
    found = with_standard(listed)
    assert [one for one in found if one in listed] == listed
    assert sum(isinstance(one, RunCheckpoint) for one in found) == 2
