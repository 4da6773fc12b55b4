"""Phases, counts and reward metrics."""

from __future__ import annotations

import math
import time

import pytest

from datamodules.ledger import CudaClock, Ledger, WallClock, WeightedMean, clock_of_process


def test_an_inner_phase_is_not_counted_twice():
    ledger = Ledger()
    with ledger.phase("reference"):
        time.sleep(0.02)
        with ledger.phase("reward"):
            time.sleep(0.05)
    assert ledger.seconds["reward"] == pytest.approx(0.05, abs=0.045)
    assert ledger.seconds["reference"] == pytest.approx(0.02, abs=0.025)


def test_an_exception_still_ends_the_phase():
    ledger = Ledger()
    with pytest.raises(ZeroDivisionError), ledger.phase("update"):
        1 / 0  # noqa: B018  # the error is the point
    with ledger.phase("update"):
        pass
    assert ledger.seconds["update"] < 0.01


class Stream:
    """A clock of a host and of its GPU, which does in turn what it was given: the only fake part of these tests.

    No CPU has CUDA events. `moment` is one: the time at which all work given before is done.
    """

    def __init__(self) -> None:
        self.host = self.gpu = 0.0
        self.waits = 0

    def compute(self, seconds: float) -> None:
        self.host += seconds

    def launch(self, seconds: float) -> None:
        self.gpu = max(self.gpu, self.host) + seconds

    def moment(self) -> float:
        return max(self.host, self.gpu)

    def seconds(self, start: float, end: float) -> float:
        self.waits += end > self.host
        self.host = max(self.host, end)
        return end - start


def test_work_of_a_gpu_counts_for_the_phase_that_launched_it():
    stream = Stream()
    ledger = Ledger(stream)
    with ledger.phase("rollout"):
        stream.compute(1)
        stream.launch(4)  # until 5
        stream.compute(0.5)  # while the GPU works
    with ledger.phase("reward"):  # at 1.5; while the GPU works until 5, then for 0.5 more
        stream.compute(4)
    with ledger.phase("reference"):
        stream.launch(2)  # from 5.5 until 7.5
        with ledger.phase("reward"):
            stream.compute(3)  # until 8.5
        stream.launch(0.25)  # until 8.75
    stream.compute(1.25)  # of no phase: from 8.75 until 9.75, by the host from 8.5
    with ledger.phase("update"):
        stream.launch(6)  # until 15.75
    with ledger.phase("sync"):
        stream.launch(0.75)  # until 16.5
    assert stream.waits == 0 and stream.host == 9.75  # nothing waits within the step
    expected = {"rollout": 5, "reward": 0.5 + 1, "reference": 2 + 0.25, "update": 6, "sync": 0.75}
    assert dict(ledger.seconds) == expected
    assert sum(expected.values()) + 1 == 16.5  # seconds of no phase beside, the whole step
    assert stream.host == 16.5
    assert dict(ledger.seconds) == expected  # read again, counted once
    total = Ledger(stream)
    total.add(ledger)
    assert dict(total.seconds) == expected


def test_phases_are_timed_by_cuda_events_once_a_gpu_is_in_use(monkeypatch: pytest.MonkeyPatch):
    assert isinstance(clock_of_process(), WallClock)
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    assert isinstance(clock_of_process(), CudaClock)


def test_sums_add_up():
    one, other = Ledger(), Ledger()
    one.count("tokens", 3)
    other.count("tokens", 4)
    other.count("prompts")
    one.add(other)
    assert dict(one.counts) == {"tokens": 7, "prompts": 1}


def test_reward_metrics_are_averaged_by_weight():
    one, other = Ledger(), Ledger()
    one.average("exact/length", WeightedMean(2.0 * 3, 3))
    other.average("exact/length", WeightedMean(8.0, 1))
    other.average("exact/other", WeightedMean())
    one.add(other)
    assert one.reward_metrics["exact/length"].value == (2 * 3 + 8) / 4
    assert math.isnan(one.reward_metrics["exact/other"].value)
    assert other.reward_metrics["exact/length"] == WeightedMean(8.0, 1)


def test_an_unknown_phase_is_refused():
    with pytest.raises(KeyError), Ledger().phase("lunch"):
        pass
