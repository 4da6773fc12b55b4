"""Borders of the callbacks that only look: what is logged, drawn, written and printed, with values worked by hand."""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import Logger
from rich.console import Console

from app.engines import Sampling, Transformers
from app.reporting.forecast_quality import informative_probability
from app.reporting.loggers.base import Media
from app.runs.summary import RolloutCounts, RunSummary
from callbacks import (
    CompletionsLog,
    DynamicSampling,
    ReferenceRollouts,
    Results,
    RolloutReplay,
    RunCheckpoint,
    RunLedger,
    RunProgress,
    RunReport,
    SelectionMonitor,
    ShardedPolicy,
)
from callbacks.watching import run_table, selection_monitor
from callbacks.watching.run_table import RunTable
from callbacks.watching.selection_monitor import UninformativeSteps, by_source
from callbacks.watching.validation import validation_interval
from datamodules.errors import UserError
from datamodules.ledger import WeightedMean
from datamodules.mixture import Mixture
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.prompts import PromptFile
from datamodules.selectors import SelectionContext
from datamodules.types import RolloutGroup, TrainBatch
from datamodules.validation import ValidationSet
from tests.support.builders import group, pool, prompt
from tests.support.policies import tiny_model
from tests.support.selector_builders import saved_and_loaded
from tests.support.trainers import MODULE, trainer_with


class NotingLogger(Logger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.saved = 0

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.logged.append((step, dict(metrics)))

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to keep."""

    def save(self) -> None:
        self.saved += 1


class NotingMedia(Media):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tables: list[tuple[str, list[dict[str, Any]], int]] = []
        self.histograms: list[tuple[str, list[float], int]] = []
        self.pictures: list[tuple[str, np.ndarray, int]] = []

    def table(self, name: str, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        self.tables.append((name, [dict(row) for row in rows], step))

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.histograms.append((name, list(values), step))

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.pictures.append((name, pixels, step))


def data_of(prompts: PromptPool, **options: Any) -> OnlinePromptDataModule:
    data = OnlinePromptDataModule(PromptFile("unread.jsonl"), **options)
    data.pools["train"] = prompts
    data.selector.setup(prompts, SelectionContext(0))
    return data


# --- The selection monitor ------------------------------------------------------------------------------------------


@pytest.fixture
def media(monkeypatch: pytest.MonkeyPatch) -> NotingMedia:
    one = NotingMedia()
    for module in ("selection_monitor", "completions"):
        monkeypatch.setattr(f"callbacks.watching.{module}.media_of", lambda trainer: [one])
    return one


def monitor_on(data: OnlinePromptDataModule, **options: int) -> SelectionMonitor:
    one = SelectionMonitor(**options)
    one.setup(trainer_with(datamodule=data), MODULE, "fit")
    return one


def step_of(monitor: SelectionMonitor, batch: TrainBatch, generations: int = 4) -> dict[str, float]:
    module: Any = SimpleNamespace(sampling=Sampling(num_generations=generations))
    monitor.on_train_batch_end(trainer_with(), module, None, batch, batch.step)
    return batch.metrics


def test_a_step_is_measured_by_what_was_chosen_for_it(media: NotingMedia) -> None:
    data = data_of(pool(8))
    monitor = monitor_on(data, histograms_every=2, pictures_every=0)
    batch = TrainBatch(2, [prompt(i) for i in (0, 1, 2)], np.array([0.25, 0.5, 1.0]))
    batch.explored = frozenset({"p1", "p6"})
    batch.pool_forecast = np.array([0.5] * 4 + [0.0] * 4)
    batch.add([group(prompt(0), [0, 1]), group(prompt(1), [1, 1]), group(prompt(7), [0, 1], source="replay")])
    batch.add([group(prompt(2), [0, 0, 0, 1])], "dropped")
    batch.add([group(prompt(i), scores, source="reference") for i, scores in ((4, [0, 1]), (5, []))], "surplus")
    found = step_of(monitor, batch)
    expected, measured = np.array([0.25, 0.5, 1.0]), np.array([0.5, 1.0, 0.25])
    assert found["selection/distinct_prompts"] == 3 and found["selection/distinct_fraction"] == 3 / 8
    assert found["selection/mean_success"] == pytest.approx(1.75 / 3)
    assert found["selection/fresh_informative_fraction"] == pytest.approx(2 / 3)
    assert found["selection/explored_fraction"] == pytest.approx(1 / 3)
    # Of p1, which was explored, and p4, a reference: the other reference lost its scores.
    assert found["selection/uniform_informative_measured"] == pytest.approx(1 / 2)
    chance = informative_probability(batch.pool_forecast, 4)
    assert found["selection/uniform_informative_forecast"] == pytest.approx(chance.mean()) and 0 < chance.mean() < 1
    assert found["selection/forecast_mean"] == pytest.approx(1.75 / 3)
    assert found["selection/forecast_brier"] == pytest.approx(np.mean((expected - measured) ** 2))
    assert found["selection/forecast_pearson"] == pytest.approx(np.corrcoef(expected, measured)[0, 1])
    assert found["selection/pool_epoch"] == 0
    assert media.histograms == [
        ("difficulty/measured_success", [0.5, 1.0, 0.25], 2),
        ("difficulty/forecast_success", [0.5] * 4 + [0.0] * 4, 2),
    ]
    media.histograms.clear()
    second = TrainBatch(3, [prompt(0), prompt(3)])
    second.add([group(prompt(0), [0, 1]), group(prompt(3), [0, 1])])
    found = step_of(monitor, second)
    assert found["selection/distinct_prompts"] == 4
    # (0.9 * 1 + 0) / (0.9 * 2 + 0): nothing was drawn uniformly in this step.
    assert found["selection/uniform_informative_measured"] == pytest.approx(0.5)
    assert not any(name.startswith(("selection/forecast", "selection/uniform_informative_f")) for name in found)
    assert media.histograms == [] and media.pictures == []
    empty = TrainBatch(4, ())  # all of it was replayed
    empty.add([group(prompt(5), [0, 1], source="replay")])
    found = step_of(monitor, empty)
    assert "selection/mean_success" not in found and media.histograms == []


def test_pictures_show_what_was_forecast_since_the_last_one(
    media: NotingMedia, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[list[float], list[float], str, int]] = []

    def draw(expected: np.ndarray, found: np.ndarray, title: str, *, uniform: np.ndarray) -> str:
        drawn.append((list(expected), list(found), title, len(uniform)))
        return title

    for name in ("reliability_figure", "scatter_figure"):
        monkeypatch.setattr(selection_monitor, name, draw)
    monkeypatch.setattr(selection_monitor, "pixels", lambda figure: figure)
    monkeypatch.setattr(selection_monitor, "_MOST_PAIRS", 2)
    monitor = monitor_on(data_of(pool(8)), pictures_every=3)
    for step in range(7):
        batch = TrainBatch(step, [prompt(step)], np.array([step / 8]))
        batch.add([group(prompt(step), [0, 1])])
        batch.reference_forecast = np.array([[0.5, 0.5]] * 3) if step == 1 else None
        step_of(monitor, batch)
        if step == 1:  # resumed
            state = saved_and_loaded(monitor.state_dict())
            monitor = monitor_on(data_of(pool(8)), pictures_every=3)
            monitor.load_state_dict(state)
        if step == 5:
            assert len(monitor._chosen) == 8 and int(monitor._chosen.sum()) == 6
            monitor.setup(trainer_with(datamodule=data_of(pool(8))), MODULE, "fit")
            assert int(monitor._chosen.sum()) == 6  # what was loaded before is kept
    first = ([1 / 8, 2 / 8], [0.5, 0.5], "steps 0 to 2", 2)
    second = ([4 / 8, 5 / 8], [0.5, 0.5], "steps 3 to 5", 0)
    assert drawn == [first, first, second, second]
    assert [(name, step) for name, _, step in media.pictures] == [
        (f"selection/{tag}", step) for step in (2, 5) for tag in ("reliability", "forecast_scatter")
    ]


def test_no_picture_is_drawn_of_nothing(media: NotingMedia) -> None:
    monitor = monitor_on(data_of(pool(8)), pictures_every=1)
    batch = TrainBatch(0, [prompt(0)])
    batch.add([group(prompt(0), [0, 1])])
    step_of(monitor, batch)
    assert media.pictures == []
    again = TrainBatch(1, ())
    again.reference_forecast = np.array([[0.5, 0.25]])
    step_of(monitor, again)
    assert [name for name, _, _ in media.pictures] == ["selection/reliability", "selection/forecast_scatter"]


@pytest.mark.parametrize("options", [{"histograms_every": 0}, {"pictures_every": -1}])
def test_intervals_of_the_monitor_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected histograms_every >= 1 and pictures_every >= 0"):
        SelectionMonitor(**options)
    SelectionMonitor(histograms_every=1, pictures_every=0)


def test_only_a_training_needs_to_know_what_was_chosen() -> None:
    one = SelectionMonitor()
    one.setup(trainer_with(datamodule=data_of(pool(8))), MODULE, "validate")
    assert len(one._chosen) == 0


def test_sources_are_measured_apart() -> None:
    def of(index: int, name: str) -> Any:
        return prompt(index, f"{name}/p{index}").__class__(f"{name}/p{index}", index, "q", "q", (1,), {}, dataset=name)

    a, b = (PromptPool.of([of(i, name) for i in range(4)]) for name in ("a", "b"))
    mixture = Mixture({"a": a, "b": b, "c": PromptPool.of([of(0, "c")])})
    batch = TrainBatch(0, [of(0, "a"), of(1, "a"), of(2, "a"), of(0, "b")])
    batch.pool_forecast = np.array([0.25] * 4 + [0.5] * 4 + [1.0])
    chosen = [group(of(0, "a"), [0, 1]), group(of(1, "a"), [1, 1])]
    batch.add([*chosen, group(of(3, "b"), [0, 0, 1, 1, 1], source="replay"), group(of(2, "b"), [])])
    assert by_source(batch, chosen, mixture) == {
        "train/a/chosen_fraction": 0.75, "train/a/reward": 0.75, "train/a/mean_success": 0.75,
        "train/a/informative_fraction": 0.5, "train/a/forecast_mean": 0.25,
        "train/b/chosen_fraction": 0.25, "train/b/reward": pytest.approx(0.6), "train/b/forecast_mean": 0.5,
        "train/c/chosen_fraction": 0.0, "train/c/forecast_mean": 1.0,
    }  # fmt: skip
    assert by_source(TrainBatch(0, ()), [], mixture) == {}


def scored(scores: Sequence[float], truncated: int = 0) -> RolloutGroup:
    one = group(prompt(0), scores)
    for position in range(truncated):
        object.__setattr__(one.completions[position], "finish_reason", "length")
    return one


def warned(steps: int, groups: list[RolloutGroup], begin: UninformativeSteps | None = None) -> list[tuple[int, str]]:
    one, found = begin or UninformativeSteps(), list[tuple[int, str]]()
    for step in range(steps):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(selection_monitor, "rank_zero_warn", lambda text, step=step: found.append((step, text)))
            one.step(step, groups)
    return found


def test_steps_that_teach_nothing_are_warned_of_ever_more_rarely() -> None:
    one = UninformativeSteps()
    found = warned(45, [scored([0, 0])], one)
    assert [step for step, _ in found] == [9, 19, 39]
    assert found[1][1].startswith("Step 19: no group of the last 20 steps was informative. 0% of their completions")
    assert warned(1, [scored([0, 0]), scored([0, 1])], one) == []
    found = warned(10, [scored([1, 1])], one)  # begins again
    assert [step for step, _ in found] == [9]
    assert found[0][1].startswith("Step 9: no group of the last 10 steps was informative. 100% of their completions")


@pytest.mark.parametrize(
    ("groups", "correct", "truncated", "advice"),
    [
        ([scored([1] * 19), scored([0])], 95, 0, "the prompts are too easy"),
        ([scored([1] * 9), scored([0])], 90, 0, "every prompt is either solved or failed"),
        ([scored([0] * 19), scored([1])], 5, 0, "the prompts are too hard"),
        ([scored([0] * 9), scored([1])], 10, 0, "every prompt is either solved or failed"),
        ([scored([0, 0], truncated=1)], 0, 50, "they end before their answer"),
        ([scored([0, 0, 0], truncated=1)], 0, 33, "the prompts are too hard"),
    ],
)
def test_the_advice_follows_from_the_outcomes(
    groups: list[RolloutGroup], correct: int, truncated: int, advice: str
) -> None:
    told = f"{correct}% of their completions were correct, {truncated}% were truncated at the length limit: {advice}"
    assert told in warned(10, groups)[0][1]


def test_without_scores_there_is_no_outcome_to_tell() -> None:
    assert warned(10, [scored([])])[0][1].endswith("rewards/failed_fraction and rewards/unscored_fraction.")


# --- Completions ----------------------------------------------------------------------------------------------------


def scorer(**given: Any) -> Any:
    return SimpleNamespace(rewards=[], **given)


def test_the_completions_of_a_step_are_written_with_what_became_of_them(tmp_path: Path, media: NotingMedia) -> None:
    log, module = CompletionsLog(every=3, samples=1), SimpleNamespace(scorer=scorer())
    trainer = trainer_with(logger=None, default_root_dir=tmp_path)
    batch = TrainBatch(3, [prompt(i) for i in (0, 1, 2)], np.array([0.25, 0.5, np.nan]))
    batch.add([group(prompt(0), [0, 1]), group(prompt(2), [1, 0])])
    batch.add([group(prompt(1), [0, 0])], "dropped")
    batch.add([group(prompt(3), [1, 1]), group(prompt(4), [1, 1], source="reference")], "surplus")
    batch.advantages = [np.array([-1.0, 1.0]), np.array([0.5, -0.5])]
    for step, its in ((2, trainer), (3, trainer_with(is_global_zero=False)), (4, trainer)):
        batch.step = step
        log.on_train_batch_end(its, module, None, batch, step)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir()) and not media.tables
    batch.step = 3
    log.on_train_batch_end(trainer, module, None, batch, 3)  # type: ignore[arg-type]
    rows = pq.read_table(tmp_path / "completions" / "step_00000003.parquet").to_pylist()
    assert [(row["prompt_id"], row["reward"], row["advantage"], row["forecast"], row["step"]) for row in rows] == [
        ("p0", 0, -1, 0.25, 3), ("p0", 1, 1, 0.25, 3), ("p2", 1, 0.5, None, 3), ("p2", 0, -0.5, None, 3),
        ("p1", 0, None, 0.5, 3), ("p1", 0, None, 0.5, 3), ("p3", 1, None, None, 3), ("p3", 1, None, None, 3),
    ]  # fmt: skip
    ((name, shown, step),) = media.tables
    assert (name, step, [row["prompt_id"] for row in shown]) == ("completions/train", 3, ["p0"])
    silent = CompletionsLog(every=1, samples=0)
    batch.forecast = None
    silent.on_train_batch_end(trainer, module, None, batch, 3)  # type: ignore[arg-type]
    assert len(media.tables) == 1
    rows = pq.read_table(tmp_path / "completions" / "step_00000003.parquet").to_pylist()
    assert {row["forecast"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("stage", "file", "tag", "step"),
    [("fit", "val_00000007", "val", 7), ("test", "test", "test", 0), ("validate", "validate", "val", 0)],
)
@pytest.mark.parametrize("named", [False, True])
def test_measured_completions_are_written_by_set(
    tmp_path: Path, media: NotingMedia, stage: str, file: str, tag: str, step: int, named: bool
) -> None:
    log = CompletionsLog()
    trainer = trainer_with(
        logger=None, default_root_dir=tmp_path, state=SimpleNamespace(fn=Stage(stage)),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(total_batch_idx=6)),
    )  # fmt: skip
    module: Any = SimpleNamespace(
        scorer=scorer(), measured_set=lambda number: ("val/a", "val/b")[number] if named else "val"
    )
    for _ in range(2):  # nothing is left of the validation before
        log.on_validation_start(trainer, module)
        for number in range(4):
            batch = TrainBatch(number, ())
            batch.add([group(prompt(number), [0, 1])])
            log.on_validation_batch_end(trainer, module, None, batch, number, number % 2)
        log.on_validation_end(trainer, module)
    folders = ("a", "b") if named else ("",)
    for number, name in enumerate(folders):
        rows = pq.read_table(tmp_path / "completions" / name / f"{file}.parquet").to_pylist()
        expected = [i for i in range(4) if not named or i % 2 == number]
        assert [row["prompt_id"] for row in rows[::2]] == [f"p{i}" for i in expected] and rows[0]["step"] == step
    expected_tags = [f"completions/{tag}/{name}" if name else f"completions/{tag}" for name in folders]
    assert [(name, at) for name, _, at in media.tables] == [(name, step) for name in expected_tags] * 2
    log.on_validation_end(trainer, module)
    assert len(media.tables) == 2 * len(folders)
    other = trainer_with(is_global_zero=False)
    log.on_validation_batch_end(other, module, None, TrainBatch(0, ()), 0)
    assert log._measured == {}


class Stage(str):
    """A stage of Lightning's, which equals its name and has it as `value`."""

    @property
    def value(self) -> str:
        return str(self)


@pytest.mark.parametrize("options", [{"every": 0}, {"samples": -1}])
def test_logs_of_completions_that_cannot_be(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected at least 1 and 0"):
        CompletionsLog(**options)
    CompletionsLog(every=1, samples=0)


# --- The account ----------------------------------------------------------------------------------------------------


def ledger_on(tmp_path: Path, **given: Any) -> tuple[RunLedger, MODULE, MODULE, NotingLogger]:
    logger = NotingLogger()
    ledger = RunLedger()
    trainer = trainer_with(
        loggers=[logger], logger=None, default_root_dir=tmp_path, datamodule=data_of(pool(4)), callbacks=[], **given
    )
    reports: list[str] = []
    module = SimpleNamespace(
        scorer=scorer(incidents=SimpleNamespace(report=reports.append)),
        last_measured={},
        reports=reports,
        environment=None,
    )
    ledger.setup(trainer, module, "fit")  # type: ignore[arg-type]
    return ledger, trainer, module, logger


def counted(step: int, **counts: float) -> TrainBatch:
    batch = TrainBatch(step, ())
    for name, amount in counts.items():
        batch.ledger.count(name.replace("__", "/"), amount)
    return batch


def test_the_account_of_two_steps_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    ledger, trainer, module, logger = ledger_on(tmp_path)
    checkpoint = RunCheckpoint()
    trainer.callbacks = [checkpoint]
    ledger.on_fit_start(trainer, module)
    now[0] = 104.0
    ledger.on_train_start(trainer, module)
    first = counted(
        0, train__prompts=2, train__completions=8, train__tokens=30, reference__prompts=1, reference__completions=4,
        reference__tokens=10, rewards__completions=12, rewards__unscored=3, rewards__failed=6, rewards__timed_out=2,
        rewards__crashed=5, discarded__prompts=1, discarded__completions=4, discarded__tokens=7, wasted__prompts=2,
        wasted__completions=3, wasted__tokens=9, replayed_groups=6,
    )  # fmt: skip
    first.ledger.seconds.update(rollout=1.25, reference=0.5)
    first.ledger.average("exact/length", WeightedMean(6.0, 4.0))
    first.metrics["nothing"] = math.nan
    first.add([group(prompt(0), [0, 1]), group(prompt(1), [1, 1]), group(prompt(2), [])])
    ledger.on_train_batch_start(trainer, module, first, 0)
    now[0] = 108.0
    ledger.on_train_batch_end(trainer, module, None, first, 0)
    ((step, metrics),) = logger.logged
    assert step == 0 and "nothing" not in metrics
    assert metrics["time/rollout"] == 1.25 and metrics["time/update"] == 0.0 and metrics["time/reference"] == 0.5
    # The reference set of 0.5 seconds was rolled out before the clock started.
    assert metrics["step_time"] == metrics["time/training"] == pytest.approx(4.5)
    assert (metrics["num_completions"], metrics["num_tokens"]) == (12, 40)
    assert metrics["tokens_per_second"] == pytest.approx(40 / 4.5)
    assert (metrics["rewards/timed_out"], metrics["rewards/crashed"]) == (2, 5)
    assert (metrics["rewards/unscored_fraction"], metrics["rewards/failed_fraction"]) == (0.25, 0.5)
    assert metrics["rewards/exact/length"] == 1.5
    assert module.reports == ["Step 0"]

    checkpoint.seconds = 1.5  # written since
    now[0] = 111.0
    second = counted(1, train__completions=8, train__tokens=60)
    second.add([group(prompt(0), [0, 1])])
    ledger.on_train_batch_start(trainer, module, second, 1)
    ledger.on_train_batch_end(trainer, module, None, second, 1)
    metrics = logger.logged[1][1]
    assert metrics["step_time"] == pytest.approx(1.5) and metrics["time/training"] == pytest.approx(6.0)
    assert (metrics["num_completions"], metrics["num_tokens"]) == (20, 100)
    assert metrics["tokens_per_second"] == pytest.approx(40)  # of this step
    assert "rewards/unscored_fraction" not in metrics and "rewards/failed_fraction" not in metrics

    measured = counted(0, validate__prompts=2, validate__completions=4, validate__tokens=11)
    ledger.on_validation_batch_end(trainer, module, None, measured, 0)
    for accuracy in (0.25, 0.75, 0.5):
        module.last_measured = {"val/accuracy": accuracy}
        ledger.steps += 1
        ledger.on_validation_end(trainer, module)
    module.last_measured = {}
    ledger.on_validation_end(trainer, module)
    trainer.state.fn = "validate"
    module.last_measured = {"val/accuracy": 1.0}
    ledger.on_validation_end(trainer, module)
    trainer.state.fn = "fit"
    assert [(one.step, one.accuracy) for one in ledger.evaluations] == [(3, 0.25), (4, 0.75), (5, 0.5)]
    assert (ledger.evaluations[0].completions, ledger.evaluations[0].completion_tokens) == (20, 100)
    assert ledger.evaluations[0].seconds == pytest.approx(6.0)
    ledger.steps = 4  # resumed from there
    module.last_measured = {"val/accuracy": 0.6}
    ledger.on_validation_end(trainer, module)
    assert [(one.step, one.accuracy) for one in ledger.evaluations] == [(3, 0.25), (4, 0.6)]
    assert module.reports.count("Validation") == 6
    ledger.on_test_end(trainer, module)
    ledger.on_predict_end(trainer, module)
    assert module.reports[-2:] == ["Test", "Prediction"]

    ledger.steps = 2
    checkpoint.seconds = 2.0
    now[0] = 120.0
    state = saved_and_loaded(ledger.state_dict())
    ledger.on_train_end(trainer, module)
    found = RunSummary.read(tmp_path / "summary.json")
    assert logger.saved == 1
    assert (found.steps, found.prompts_rolled_out, found.completions, found.completion_tokens) == (2, 2, 16, 90)
    assert found.replayed_groups == 6 and found.informative_fraction == pytest.approx((1 / 2 + 1) / 2)
    assert found.reference == RolloutCounts(1, 4, 10) and found.validation == RolloutCounts(2, 4, 11)
    assert found.discarded == RolloutCounts(1, 4, 7) and found.wasted == RolloutCounts(2, 3, 9)
    assert (found.discarded_groups, found.failed_rewards, found.unscored_completions) == (3, 7, 3)
    assert found.val == {"first": 0.25, "best": 0.6, "last": 0.6}
    assert found.training_seconds == pytest.approx(6.0)
    assert found.seconds["total"] == pytest.approx(20.0) and found.seconds["checkpoint"] == pytest.approx(2.0)
    assert found.seconds["rollout"] == pytest.approx(1.25)
    assert found.completed is False and found.validation_prompts is None and found.config_sha256 is None

    again, other, module, _ = ledger_on(tmp_path / "again", global_step=8)
    again.load_state_dict(state)
    again.on_fit_start(other, module)
    now[0] = 123.0
    again.on_fit_end(other, module)
    resumed = json.loads((tmp_path / "again" / "summary.json").read_text())
    before = json.loads((tmp_path / "summary.json").read_text())
    assert resumed.pop("completed") is True and before.pop("completed") is False
    assert (resumed["seconds"].pop("total"), before["seconds"].pop("total")) == (23.0, 20.0)
    assert (resumed["seconds"].pop("checkpoint"), before["seconds"].pop("checkpoint")) == (1.5, 2.0)
    assert resumed == before
    (tmp_path / "again" / "summary.json").unlink()
    again.on_fit_end(other, module)  # has been written
    assert not (tmp_path / "again" / "summary.json").exists()


def test_what_a_run_leaves_when_it_fails(tmp_path: Path) -> None:
    ledger, trainer, module, _ = ledger_on(tmp_path)
    file = tmp_path / "summary.json"
    ledger.on_exception(trainer, module, ValueError())  # in its first step
    ledger.on_fit_end(trainer, module)
    assert not file.exists()
    ledger.steps = 3
    trainer.state.fn = "validate"
    ledger.on_exception(trainer, module, ValueError())
    trainer.state.fn = "fit"
    trainer.is_global_zero = False
    ledger.on_exception(trainer, module, ValueError())
    assert not file.exists()
    trainer.is_global_zero, trainer.global_step = True, 8
    ledger.on_exception(trainer, module, ValueError())
    assert RunSummary.read(file).completed is False
    ledger.on_train_end(trainer, module)
    assert RunSummary.read(file).completed is True
    ledger.on_train_start(trainer, module)  # resumed: it may be killed before it can write so
    assert RunSummary.read(file).completed is False


def test_a_metric_of_a_reward_never_replaces_one_of_the_run(tmp_path: Path) -> None:
    ledger, trainer, module, logger = ledger_on(tmp_path)
    for step in range(2):
        batch = counted(step)
        batch.metrics["rewards/exact/mean"] = 0.25
        batch.ledger.average("exact/mean", WeightedMean(9.0, 1.0))
        if step:
            ledger.on_train_batch_end(trainer, module, None, batch, step)  # is not told a second time
        else:
            with pytest.warns(UserWarning, match=r"logs 'mean', but rewards/exact/mean is a metric that every run"):
                ledger.on_train_batch_end(trainer, module, None, batch, step)
    assert [metrics["rewards/exact/mean"] for _, metrics in logger.logged] == [0.25, 0.25]
    assert ledger._clashes == {"rewards/exact/mean"}
    assert [metrics["num_tokens"] for _, metrics in logger.logged] == [0, 0]


def test_validation_prompts_are_told_by_their_fingerprints(tmp_path: Path) -> None:
    ledger, trainer, module, _ = ledger_on(tmp_path)
    pools = trainer.datamodule.pools
    pools |= {"val/a": pool(2), "val/b": pool(3), "test": pool(1)}
    (tmp_path / "config.yaml").write_text("a: 1\n")
    ledger.on_train_end(trainer, module)
    found = RunSummary.read(tmp_path / "summary.json")
    assert found.validation_prompts == f"{pools['val/a'].fingerprint}+{pools['val/b'].fingerprint}"
    assert found.config_sha256 == hashlib.sha256(b"a: 1\n").hexdigest()
    assert found.val == {} and found.informative_fraction == 0.0


# --- The report -----------------------------------------------------------------------------------------------------


def test_the_history_of_prompts_is_kept_and_written_after_two_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    monkeypatch.setattr("callbacks.watching.run_report.write_report", written.append)
    data, report = data_of(pool(6)), RunReport()
    trainer = trainer_with(datamodule=data, logger=None, default_root_dir=tmp_path)
    module: Any = SimpleNamespace(scorer=scorer())
    report.setup(trainer, module, "fit")
    file = tmp_path / "prompts.parquet"
    for step, (chosen, scores) in enumerate([((0, 1), [0, 1]), ((1, 2), [1, 1])]):
        batch = TrainBatch(step, [prompt(i) for i in chosen])
        batch.add([group(prompt(i), scores) for i in chosen])
        batch.add([group(prompt(5), [0, 0], source="reference"), group(prompt(4), [])], "surplus")
        batch.add([group(prompt(3), [1, 1], source="replay")])
        report.on_train_batch_end(trainer, module, None, batch, step)
        if not step:
            report.on_fit_end(trainer, module)
            assert not file.exists()  # of a single step
            state = saved_and_loaded(report.state_dict())
            report = RunReport()
            report.load_state_dict(state)  # before the pools are known, as of a validation
            assert report.state_dict() == {}
            report.setup(trainer, module, "validate")
            assert report.state_dict() == {}
            report.setup(trainer, module, "fit")
            report.load_state_dict({})
            report.load_state_dict(state)
            report.setup(trainer, module, "fit")  # keeps what was loaded
    trainer.is_global_zero = False
    report.on_fit_end(trainer, module)
    trainer.is_global_zero, trainer.state.fn = True, "validate"
    report.on_exception(trainer, module, ValueError())
    assert not file.exists() and not written
    trainer.state.fn = "fit"
    report.on_exception(trainer, module, ValueError())
    found = pq.read_table(file).to_pydict()
    assert written == [tmp_path]
    assert found["times_chosen"] == [1, 2, 1, 0, 0, 0] and found["last_chosen_step"] == [0, 1, 1, None, None, None]
    assert found["times_measured"] == [1, 2, 1, 0, 0, 2]
    assert found["last_success"] == [0.5, 1.0, 1.0, None, None, 0.0]
    assert found["mean_success"] == [0.5, 0.75, 1.0, None, None, 0.0]
    file.unlink()
    again = RunReport()
    again.setup(trainer, module, "fit")
    again.load_state_dict(saved_and_loaded(report.state_dict()))
    again.on_fit_end(trainer, module)  # which had no step left to take
    assert pq.read_table(file).to_pydict() == found and written == [tmp_path] * 2


# --- Progress -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "mini_batches", "batches"), [(8, 1, 8), (8, 3, 3), (9, 3, 3), (-1, 1, math.inf), (0, 1, 0)]
)
def test_the_bar_counts_steps_and_not_updates(
    updates: int, mini_batches: int, batches: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = RunProgress()
    module = Counted(mini_batches)
    monkeypatch.setattr("callbacks.watching.progress.GRPOModule", Counted)
    bar._trainer = trainer_with(max_steps=updates, lightning_module=module)
    assert bar.total_train_batches == batches
    bar._trainer = trainer_with(max_steps=updates, lightning_module=object())
    assert bar.total_train_batches == (updates if updates >= 0 else math.inf)


class Counted:
    """A module of so many mini-batches."""

    def __init__(self, mini_batches: int) -> None:
        self.mini_batches = mini_batches


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "step 3/8  reward 0.500  informative 0.250  tok/s 100  val 0.125\n"),
        ({"max_steps": -1}, "step 3  reward 0.500  informative 0.250  tok/s 100  val 0.125\n"),
        ({"is_global_zero": False}, ""),
        ({"state": SimpleNamespace(fn="validate")}, ""),
    ],
)
def test_a_validation_is_told_in_one_line(
    changes: dict[str, Any], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bar = RunProgress()
    bar.disable()
    batch = TrainBatch(2, ())
    batch.metrics = {"reward": 0.5, "selection/informative_fraction": 0.25, "tokens_per_second": 100.4, "loss": 3.0}
    metrics = {"val/accuracy": torch.tensor(0.125), "val/reward": torch.tensor(1.0)}
    trainer = trainer_with(**({"callback_metrics": metrics} | changes))
    bar.on_train_batch_end(trainer, MODULE, None, batch, 2)
    bar.on_validation_end(trainer, MODULE)
    assert capsys.readouterr().out == line


def test_large_values_are_shown_without_a_fraction() -> None:
    bar = RunProgress()
    for value, shown in ((99.9994, "99.999"), (100.0, "100"), (1234.6, "1235")):
        bar._latest = {"tokens_per_second": value}
        assert bar.get_metrics(trainer_with(callback_metrics={}), MODULE) == {"tok/s": shown}


# --- When a run is validated ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "max_steps", "mini_batches", "interval"),
    [
        (None, 100, 1, 10), (None, 100, 3, 3), (None, 4, 1, 1), (None, -1, 1, 10), (None, 0, 1, 10), (7, 100, 1, 7),
        (7, -1, 1, 7), (0.25, 100, 1, 25), (0.25, 100, 3, 8), (1.0, 100, 3, 34), (1.0, 1, 1, 1),
        (0.001, 100, 1, 1), (1, 100, 1, 1),
    ],
)  # fmt: skip
def test_steps_between_validations(given: float | None, max_steps: int, mini_batches: int, interval: int) -> None:
    assert validation_interval(given, max_steps, mini_batches) == interval


@pytest.mark.parametrize(
    ("given", "max_steps", "told"),
    [
        (0, 8, "is 0, expected"), (-1, 8, "is -1, expected"), (0.0, 8, "is 0.0, expected"),
        (1.5, 8, "a fraction up to 1.0"), (0.5, -1, "a fraction up to 1.0"), (0.5, 0, "a fraction up to 1.0"),
    ],
)  # fmt: skip
def test_intervals_that_cannot_be(given: float, max_steps: int, told: str) -> None:
    with pytest.raises(UserError, match=told):
        validation_interval(given, max_steps, 1)


# --- The table of a run ---------------------------------------------------------------------------------------------


def module_like(**given: Any) -> Any:
    usual = {
        "sampling": Sampling(num_generations=4, max_completion_length=10), "mini_batches": 3,
        "max_tokens_per_microbatch": 4096, "engine": None, "environment": None,
        "sampling_of": lambda one: Sampling(num_generations=2 * one.every, temperature=0.5),
    }  # fmt: skip
    return SimpleNamespace(**(usual | given))


def rows_of(*callbacks: Any, processes: int = 2, updates: int = 10, **options: Any) -> dict[str, tuple[str, str]]:
    data = data_of(pool(4), prompts_per_step=9)
    rows = run_table._run_rows(module_like(**options), data, list(callbacks), processes, updates)
    return {name.strip(): (per, total) for name, per, total in rows}


def test_the_numbers_of_a_step_and_a_run() -> None:
    assert rows_of() == {
        "prompts per step": ("5", "9"), "rolled out": ("5", "9"), "replayed (buffer full)": ("0", "0"),
        "completions per step": ("18", "36"), "generated": ("18", "36"),
        "completion tokens generated, at most": ("180", "360"), "mini-batches per step": ("", "3"),
        "completions per mini-batch": ("6", "12"), "tokens per micro-batch, at most": ("4,096", ""),
        "steps": ("", "4"), "optimizer steps (trainer.max_steps 10)": ("", "12"),
    }  # fmt: skip
    found = rows_of(
        RolloutReplay(fresh_fraction=0.5), ReferenceRollouts(size=16, every=3), DynamicSampling(), updates=-1
    )
    assert found["rolled out"] == ("2", "4") and found["replayed (buffer full)"] == ("3", "5")
    assert found["generated"] == ("8", "16") and found["completions per step"] == ("18", "36")
    assert found["completion tokens generated, at most"] == ("80", "160")
    assert found["reference completions, every 3"] == ("32", "64")
    assert found["refills of what a filter drops, at most"] == ("", "10")
    assert "steps" not in found
    assert rows_of(updates=1)["steps"] == ("", "1")


def test_the_rows_of_sources_and_sets() -> None:
    def sources(mixture: str, **weights: float | None) -> list[tuple[str, str, str]]:
        files = {name: PromptFile("unread.jsonl", weight=weight) for name, weight in weights.items()}
        data = OnlinePromptDataModule(files, mixture=mixture)  # type: ignore[arg-type]
        before = run_table._source_rows(data)
        assert [row[2] for row in before] == ["" if one is None else f"weight {one:g}" for one in weights.values()]
        data.pools["train"] = Mixture({"a": pool(3), "b": PromptPool.of([prompt(9, "q")])}, {"a": 0.75, "b": 0.25})
        return run_table._source_rows(data)

    assert sources("keep", a=3, b=1) == [
        ("  source a (mixture keep)", "", "3 prompts, weight 3, 75.0% of those chosen"),
        ("  source b (mixture keep)", "", "1 prompts, weight 1, 25.0% of those chosen"),
    ]
    assert [row[2] for row in sources("floor", a=0.5, b=None)] == [
        "3 prompts, weight 0.5, at least 75.0% of those chosen", "1 prompts, at least 25.0% of those chosen",
    ]  # fmt: skip
    assert sources("free", a=None, b=None)[0][2] == "3 prompts, any number of those chosen"
    assert run_table._source_rows(data_of(pool(2))) == []
    source = PromptFile("unread.jsonl")
    data = OnlinePromptDataModule(source, val={"a": source, "b": ValidationSet(source, every=2)})
    assert run_table._set_rows(module_like(), data) == [
        ("  val/a, completions", "", "2 at T 0.5"),
        ("  val/b, completions, every 2 steps", "", "4 at T 0.5"),
    ]
    assert run_table._set_rows(module_like(), OnlinePromptDataModule(source, val=source)) == []


class Letters:
    """A tokenizer of which every token is a letter."""

    chat_template: str | None = None

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert not skip_special_tokens
        return "".join(chr(96 + token % 26 + 1) for token in tokens)


@pytest.mark.parametrize(("length", "shown"), [(3, "bcd"), (1000, None), (1001, 1001)])
def test_the_first_prompt_is_shown_as_the_policy_reads_it(length: int, shown: str | int | None) -> None:
    first = prompt(0).__class__("p", 0, "q", "q", tuple(range(1, length + 1)), {})
    tokenizer: Any = Letters()
    renderer = SimpleNamespace(uses_chat_template=False, template=None)
    source: Any = SimpleNamespace(renderer=lambda given: renderer)
    text = run_table._first_prompt(PromptPool.of([first, prompt(1)]), source, "", tokenizer)
    whole = tokenizer.decode(list(range(1, length + 1)), False)
    cut = f"{whole[:500]} [...] {whole[-500:]}" if shown == 1001 else whole
    assert text == f"first prompt, {length} tokens, without a template:\n{cut}"
    if shown == "bcd":
        renderer.template = "x"
        told = [run_table._first_prompt(PromptPool.of([first]), source, "a", tokenizer)]
        tokenizer.chat_template = "y"
        told.append(run_table._first_prompt(PromptPool.of([first]), source, "a", tokenizer))
        renderer.uses_chat_template = True
        told.append(run_table._first_prompt(PromptPool.of([first]), source, "a", tokenizer))
        assert [one.split(", 3 tokens, ")[1].split(":\n")[0] for one in told] == [
            "rendered by the data's template",
            "rendered by the data's template, in place of the tokenizer's chat template",
            "rendered by the tokenizer's chat template",
        ]
        assert all(one.startswith("first prompt of a, 3 tokens") for one in told)


@pytest.mark.parametrize("given", [True, False])
def test_rank_zero_prints_the_table(given: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[object] = []
    monkeypatch.setattr(run_table, "print_run_table", lambda *one: printed.append(one[-1]))
    trainer = trainer_with(is_global_zero=given, datamodule=None, world_size=3)
    RunTable().on_fit_start(trainer, SimpleNamespace(policy_model=None))  # type: ignore[arg-type]
    assert printed == ([3] if given else [])


def sizes_of(
    monkeypatch: pytest.MonkeyPatch, trainer: Any, data: OnlinePromptDataModule, processes: int, **given: Any
) -> tuple[Any, Any]:
    """Return the precision and the sizes for which the memory of a process is estimated."""
    asked: list[tuple[Any, Any]] = []

    def parts(policy: object, precision: Any, sizes: Any) -> list[Any]:
        asked.append((precision, sizes))
        return [
            SimpleNamespace(name="a", bytes=2**20, phase="always"),
            SimpleNamespace(name="b", bytes=2**19, phase="update"),
        ]

    monkeypatch.setattr(run_table, "memory_parts", parts)
    options = SimpleNamespace(share_prompts=True, surrogate=SimpleNamespace(beta=given.pop("beta", 0.0)))
    module = module_like(
        **({"engine": Transformers(max_rows=7, max_cache_tokens=11, prefill_tokens=13), "options": options} | given)
    )
    policy = tiny_model(16, seed=0).float()
    rows = run_table._memory_rows(trainer, module, data, policy, processes)
    prompts = asked[0][1].prompt_length
    assert rows == [
        (f"estimated memory, prompts of {prompts:,} tokens", "1.50 MiB", "update"), ("  a", "1.00 MiB", "always"),
        ("  b", "0.50 MiB", "update"),
    ]  # fmt: skip
    return asked[0]


def test_the_sizes_for_which_memory_is_estimated(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = SimpleNamespace(root_device=torch.device("cpu"))
    data = data_of(pool(4), prompts_per_step=9)
    trainer = trainer_with(precision="32-true", strategy=strategy)
    precision, sizes = sizes_of(monkeypatch, trainer, data, 2)
    assert (precision.weights, precision.compute, precision.autocast) == (4, 4, False)
    assert (sizes.processes, sizes.shards, sizes.device, sizes.prompts, sizes.rolled_out) == (2, 1, "cpu", 3, 9)
    assert (sizes.generations, sizes.prompt_length, sizes.completion_length, sizes.max_tokens) == (4, 512, 10, 4096)
    assert (sizes.shared, sizes.has_reference) == (True, False)
    assert (sizes.max_rows, sizes.max_cache_tokens, sizes.prefill_tokens) == (7, 11, 13)
    for source in data.train_sources.values():
        source.max_prompt_length = 77
    trainer = trainer_with(
        precision="bf16-mixed", strategy=strategy, callbacks=[ReferenceRollouts(size=20), RolloutReplay()]
    )
    precision, sizes = sizes_of(monkeypatch, trainer, data, 2, beta=0.1)
    assert (precision.weights, precision.compute, precision.autocast) == (4, 2, True)
    assert (sizes.rolled_out, sizes.prompt_length, sizes.has_reference) == (20, 77, True)
    trainer = trainer_with(precision="bf16-mixed", strategy=strategy, callbacks=[ShardedPolicy(), RolloutReplay()])
    precision, sizes = sizes_of(monkeypatch, trainer, data, 4)
    assert (precision.compute, precision.autocast, sizes.shards, sizes.rolled_out) == (2, False, 4, 4)
    sharded = ShardedPolicy(shard_size=2, compute_dtype="bfloat16")
    precision, sizes = sizes_of(
        monkeypatch, trainer_with(precision="32-true", strategy=strategy, callbacks=[sharded]), data, 4, engine=object()
    )
    assert (precision.compute, sizes.shards) == (2, 2)
    assert sizes.max_rows != 7


def test_memory_that_cannot_be_estimated_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> list[Any]:
        raise ValueError("no decoder")

    trainer = trainer_with(precision="32-true", strategy=SimpleNamespace(root_device=torch.device("cpu")))
    options = SimpleNamespace(share_prompts=True, surrogate=SimpleNamespace(beta=0.0))
    module = module_like(engine=Transformers(), options=options)
    data, policy = data_of(pool(4)), tiny_model(16, seed=0)
    monkeypatch.setattr(run_table, "memory_parts", fails)
    assert run_table._memory_rows(trainer, module, data, policy, 1) == [("memory is not estimated: no decoder", "", "")]
    monkeypatch.setattr(
        run_table,
        "memory_parts",
        lambda *_: [SimpleNamespace(name="a", bytes=2**29, phase=one) for one in ("always", "x")],
    )
    assert run_table._memory_rows(trainer, module, data, policy, 1)[0][1] == "1.00 GiB"


@pytest.mark.parametrize(
    ("interval", "rows"), [(1200, [("steps between validations", "", "1,200")]), (1.0, []), (None, [])]
)
def test_the_row_of_validations(interval: object, rows: list[object]) -> None:
    assert run_table._validation_row(trainer_with(val_check_interval=interval)) == rows


def test_the_table_names_what_is_trained_and_on_what(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.StringIO()
    monkeypatch.setattr(run_table, "Console", lambda: Console(file=written, width=120))
    monkeypatch.setattr(run_table, "_memory_rows", lambda *_: [("estimated memory", "7 MiB", "update")])
    data, policy = data_of(pool(4), prompts_per_step=2), torch.nn.Linear(3, 2)
    policy.bias.requires_grad = False
    held = [torch.bfloat16, torch.float32]
    stored = SimpleNamespace(stored_dtype=lambda: held[0], weights_dtype=lambda: held[1])
    module = module_like(policy_path="tiny", policy=stored)
    trainer = trainer_with(precision="32-true", val_check_interval=None)

    def table(**given: bool) -> list[str]:
        written.seek(0)
        written.truncate()
        run_table.print_run_table(trainer, module, data, policy, 2, **given)
        return [" ".join(line.split()) for line in re.sub(r"[^\w\n ,.()-]", " ", written.getvalue()).splitlines()]

    rows = table()
    assert "tiny with Uniform" in rows and "per rank (2) in all" in rows
    for row in ("policy parameters 8", "trained 6", "train prompts 4", "weights (in the file bfloat16) float32",
                "precision of computation (trainer.precision) 32-true", "prompts per step 1 2"):  # fmt: skip
        assert row in rows
    assert not any("memory" in row or "first prompt" in row or "validations" in row for row in rows)
    held[0], trainer.val_check_interval = torch.float32, 7
    data.pools["train"].report = "4 prompts kept"  # type: ignore[assignment]
    data.tokenizer = Letters()  # type: ignore[assignment]
    renderer = SimpleNamespace(uses_chat_template=False, template=None)
    monkeypatch.setattr(PromptFile, "renderer", lambda *_: renderer)
    rows = table(with_memory=True)
    for row in ("weights float32", "estimated memory 7 MiB update", "steps between validations 7",
                "train 4 prompts kept", "first prompt, 3 tokens, without a template", "bcd"):  # fmt: skip
        assert row in rows


# --- What other commands measured -----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["validate", "predict"])
def test_what_was_measured_is_written_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    source = PromptFile("unread.jsonl")
    data = OnlinePromptDataModule(source, val={"a": source, "b": source})
    data.pools = {"train": pool(4), "val/a": pool(2), "val/b": pool(2)}
    data.pools["train"].report, data.pools["val/a"].report = "of train", "of a"  # type: ignore[assignment]
    metrics = {"val/b": torch.tensor(0.5), "val/a": torch.tensor(0.25), "val/nothing": torch.tensor(math.nan)}
    trainer = trainer_with(
        state=SimpleNamespace(fn=Stage(command)), logger=None, default_root_dir=tmp_path / "new", datamodule=data,
        callback_metrics=metrics, ckpt_path=None,
    )  # fmt: skip
    module = module_like(policy_path="tiny", measured_sets=lambda stage: {})
    results = Results()
    for _ in range(2):  # nothing is left of the one before
        results.on_validation_start(trainer, module)
        assert results._said == []
        batch = TrainBatch(0, [prompt(i) for i in range(3)])
        batch.add([group(prompt(0), [0, 1]), group(prompt(1), [1, 1]), group(prompt(2), [])])
        results.on_validation_batch_end(trainer, module, None, batch, 0)
        results.on_validation_end(trainer, module)
    content = json.loads((tmp_path / "new" / "results.json").read_text())
    assert content["prompts"] == 3 and content["policy"] == "tiny" and content["checkpoint"] is None
    assert content["metrics"] == ({"mean_success": 0.75} if command == "predict" else {"val/a": 0.25, "val/b": 0.5})
    assert list(content["metrics"]) == sorted(content["metrics"])
    assert {name: one["data"] for name, one in content["sets"].items()} == {"val/a": "of a", "val/b": "of train"}
    assert content["sets"]["val/a"]["sampling"]["num_generations"] == 2
    results.teardown(trainer, module, command)
    assert capsys.readouterr().out == (
        "measured: the policy tiny itself, since no --ckpt_path was given, on 3 prompts: mean success 0.750\n"
        f"results: {tmp_path / 'new' / 'results.json'}\n"
        f"completions: {tmp_path / 'new' / 'completions' / f'{command}.parquet'}\n"
    )
    results.teardown(trainer, module, command)  # said once
    for its in (trainer_with(state=SimpleNamespace(fn=Stage("fit"))), trainer_with(is_global_zero=False)):
        its.state.fn = Stage(its.state.fn)
        results.on_validation_start(its, module)
        results.on_validation_end(its, module)
        results.teardown(its, module, command)
    assert capsys.readouterr().out == ""
    (tmp_path / "step_1.ckpt").write_text("")
    (tmp_path / "last.ckpt").symlink_to("step_1.ckpt")
    trainer.ckpt_path = str(tmp_path / "last.ckpt")
    results.on_validation_start(trainer, module)
    results.on_validation_end(trainer, module)
    results.teardown(trainer, module, command)
    said = capsys.readouterr().out
    assert f"the policy tiny with the weights of {tmp_path / 'step_1.ckpt'}, on 0 prompts: no completion was" in said
    assert json.loads((tmp_path / "new" / "results.json").read_text())["checkpoint"] == str(tmp_path / "step_1.ckpt")
