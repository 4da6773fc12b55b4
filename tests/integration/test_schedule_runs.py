"""The learning rate of whole runs, from the first update to the last."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from app.update.optimization import Optimization
from datamodules.errors import UserError
from tests.support.command import logged
from tests.support.refusal import Place, model
from tests.support.tables import few

FIT = ("fit", "--config", "run.yaml")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_schedule_without_an_end_is_refused(place: Place, schedule: str) -> None:
    place.config(lambda c: model(c).update(optimization={"schedule": schedule, "warmup_steps": 2}))
    line = place.refused(*FIT, "--trainer.max_steps=-1", "--trainer.max_time=00:00:00:20")
    assert "trainer.max_steps" in line
    assert line.startswith(f"model.optimization.schedule is {schedule}, which ends ")


def test_a_schedule_ends_with_the_passes(place: Place) -> None:
    place.config(lambda c: model(c).update(optimization={"schedule": "linear", "learning_rate": 8e-4}))
    code, said = place.run(*FIT, "--trainer.max_steps=-1", "--trainer.max_epochs=2")
    assert code == 0, said[-2000:]
    rates = logged(place.path / "runs/small/version_0")["learning_rate"]
    # 2 passes over 8 prompts, 2 in each step.
    assert list(rates.values()) == pytest.approx([1e-4 * left for left in range(8, 0, -1)])


def test_a_constant_rate_needs_no_end(place: Place) -> None:
    place.config(lambda c: model(c).update(optimization={"schedule": "constant_with_warmup", "warmup_steps": 1}))
    code, said = place.run(*FIT, "--trainer.max_steps=-1", "--trainer.max_time=00:00:00:02")
    assert code == 0, said[-2000:]
    rates = logged(place.path / "runs/small/version_0")["learning_rate"]
    assert len(rates) > 1
    assert [*rates.values()][1:] == pytest.approx([1e-6] * (len(rates) - 1))


@pytest.mark.parametrize(("max_steps", "mini_batches", "updates"), [(6, 4, 8), (3, 2, 4), (1, 2, 2)])
def test_the_schedule_ends_with_the_last_update(place: Place, max_steps: int, mini_batches: int, updates: int) -> None:
    def change(config: dict[str, Any]) -> None:
        model(config).update(optimization={"schedule": "cosine", "learning_rate": 1e-6}, mini_batches=mini_batches)

    place.config(change)
    code, said = place.run(*FIT, f"--trainer.max_steps={max_steps}", f"--data.prompts_per_step={mini_batches}")
    assert code == 0, said[-2000:]
    run = place.path / "runs/small/version_0"
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == updates
    # Logged once per batch: the rate of its last update.
    last = range(mini_batches - 1, updates, mini_batches)
    expected = [0.5e-6 * (1 + math.cos(math.pi * done / updates)) for done in last]
    assert list(logged(run)["learning_rate"].values()) == pytest.approx(expected, rel=1e-6)


SCHEDULES = {
    "linear": [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0],
    "cosine": [0.0, 0.5, 1.0, (2 + 2**0.5) / 4, 0.5, (2 - 2**0.5) / 4, 0.0, 0.0, 0.0],
    "constant_with_warmup": [0.0, 0.5, *[1.0] * 7],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rate_never_rises_after_the_end(schedule: str) -> None:
    options = Optimization(learning_rate=2.0, schedule=schedule, warmup_steps=2)
    optimizer = options.optimizer(torch.nn.Linear(2, 2))
    scheduler = options.scheduler(optimizer, 6)
    rates = []
    for _ in range(9):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2.0 * one for one in SCHEDULES[schedule]], abs=1e-12)


def test_a_warm_up_that_outlasts_the_run_is_said() -> None:
    with pytest.warns(UserWarning, match="warmup_steps is 8, but the run takes 8 optimizer steps"):
        Optimization(schedule="linear", warmup_steps=8).check_length(8)


NUMBERS = {
    "learning_rate": (0, -1e-6, math.inf, math.nan),
    "weight_decay": (-0.1, math.inf, math.nan),
    "betas": ((1, 1), (0.9, 1.0), (-0.1, 0.9), (math.nan, 0.9), (0.9, math.inf)),
    "clip_norm": (-1, math.nan, math.inf),
    "warmup_steps": (-1, 3),
}


@pytest.mark.parametrize(("name", "given"), few([(name, one) for name, many in NUMBERS.items() for one in many], 8))
def test_numbers_that_cannot_train_are_refused(name: str, given: object) -> None:
    with pytest.raises(UserError, match=rf"optimization\.{name} is .*[Ss]et "):
        Optimization(**{name: given})  # type: ignore[arg-type]
