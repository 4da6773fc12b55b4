"""The seconds that a run's clock counts, and the budget that uses it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from callbacks import ClockBudget, ReferenceRollouts, Rollouts, RunCheckpoint, RunLedger, WeightSync
from callbacks.watching.run_ledger import TrainingClock
from datamodules.errors import UserError
from datamodules.selectors import Uniform
from tests.support.scripted_run import HALF, scripted_run

PATTERNS = [HALF] * 12


def test_steps_are_laid_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = TrainingClock()
    clock.start()
    now[0] = 103.0
    assert clock.lap() == pytest.approx(3.0)
    now[0] = 110.0  # validation
    clock.start()
    clock.add(2.0)  # a reference set before the loop
    clock.add(-0.5)  # a checkpoint within the step
    now[0] = 114.0
    assert clock.lap() == pytest.approx(4 + 2 - 0.5)
    now[0] = 115.0
    assert clock.lap() == pytest.approx(1.0)
    assert clock.seconds == pytest.approx(3 + 5.5 + 1)


def account(folder: Path) -> dict:
    return json.loads((folder / "lightning_logs" / "version_0" / "summary.json").read_text())


def test_a_budget_ends_a_run_that_is_then_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = RunLedger()
    callbacks = [WeightSync(), Rollouts(), ledger, ClockBudget(seconds=1e-3), RunCheckpoint(every=10)]
    run = scripted_run(tmp_path, monkeypatch, PATTERNS, callbacks, steps=20)
    assert len(run.steps) == 1
    found = account(tmp_path)
    assert found["completed"] is True
    assert found["steps"] == 1
    assert found["training_seconds"] == pytest.approx(ledger.clock.seconds, abs=1e-3)
    # The end is saved although no checkpoint was due.
    assert (tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "step_00000001.ckpt").exists()


def test_the_first_reference_set_is_counted_and_checkpoints_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = RunCheckpoint._save
    measure = ReferenceRollouts._measure

    def slow_save(self, trainer, pl_module, *, ends=False) -> None:
        if self._due is not None:
            time.sleep(0.6)
            self.seconds += 0.6
        save(self, trainer, pl_module, ends=ends)

    def slow_measure(self, pl_module, ledger, step) -> None:
        with ledger.phase("reference"):
            time.sleep(0.4)
        measure(self, pl_module, ledger, step)

    monkeypatch.setattr(RunCheckpoint, "_save", slow_save)
    monkeypatch.setattr(ReferenceRollouts, "_measure", slow_measure)
    ledger = RunLedger()
    callbacks = [WeightSync(), ReferenceRollouts(size=4, every=1), Rollouts(), ledger, RunCheckpoint(every=1)]
    run = scripted_run(tmp_path, monkeypatch, PATTERNS, callbacks, selector=Uniform(), steps=3)
    # Three sets: before the first step, and after the first and the second.
    seconds = [step.metrics["step_time"] for step in run.steps]
    phases = [
        sum(value for name, value in step.metrics.items() if name.startswith("time/") and name != "time/training")
        for step in run.steps
    ]
    assert [round(step.metrics["time/reference"] // 0.4) for step in run.steps] == [2, 1, 0]
    # The 0.6 seconds of a checkpoint are not among the seconds outside the phases.
    assert all(0 <= whole - phase < 0.5 for phase, whole in zip(phases, seconds, strict=True))
    clocks = [step.metrics["time/training"] for step in run.steps]
    assert clocks == pytest.approx([sum(seconds[: n + 1]) for n in range(3)])
    # 4 prompts of 4 completions a step, and reference sets of 4: one chosen from a set is not rolled out again.
    counts = [step.metrics["num_completions"] for step in run.steps]
    fresh = [sum(group.source == "fresh" for group in step.groups) for step in run.steps]
    assert counts == [16 * 2 + 4 * fresh[0], 16 * 3 + 4 * sum(fresh[:2]), 16 * 3 + 4 * sum(fresh)]


def test_a_budget_of_no_seconds_is_refused() -> None:
    with pytest.raises(UserError, match="above 0"):
        ClockBudget(0.0)
