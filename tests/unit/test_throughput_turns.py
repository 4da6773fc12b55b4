"""The throughput benchmark: two processes take turns."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from datamodules.errors import UserError
from tests.benchmarks.turns import Clock, Side


def write_steps(path: Path, name: str, steps: int, clock: Clock) -> None:
    """Stands for a trainer: a line at the begin and at the end of every step."""
    for _ in range(steps):
        clock.start()
        with path.open("a") as file:
            file.write(f"{name}<")
        time.sleep(0.05)
        with path.open("a") as file:
            file.write(f"{name}>")
        clock.stop(rollout=0.02, reward=0.01, update=None, completion_tokens=7)


def refuse(clock: Clock) -> None:
    raise UserError("no such policy")


def die(clock: Clock) -> None:
    clock.start()
    os._exit(3)


def test_steps_alternate_and_do_not_overlap(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sides = [Side(name, write_steps, log, name, 3) for name in "ab"]
    for side in sides:
        side.set_up()
    steps = [side.step() for _ in range(3) for side in sides]
    for side in sides:
        side.end()
    assert log.read_text() == "a<a>b<b>" * 3
    assert all(0.05 <= step.seconds < 1 and step.completion_tokens == 7 for step in steps)
    assert steps[0].update == pytest.approx(steps[0].seconds - 0.03)


def test_a_trainers_failure_is_told() -> None:
    with pytest.raises(UserError, match="no such policy"):
        Side("a", refuse).set_up()
    side = Side("b", die)
    side.set_up()
    with pytest.raises(RuntimeError, match="b: its process ended with code 3"):
        side.step()


def test_a_trainer_that_waits_ends_with_its_parent() -> None:
    side = Side("a", write_steps, Path(os.devnull), "a", 1)
    side.set_up()
    side.end()
    assert side._process.exitcode == 0
