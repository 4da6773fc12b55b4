"""Phases, counts and reward metrics."""

from __future__ import annotations

import math
import time

import pytest

from datamodules.ledger import Ledger, WeightedMean


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
