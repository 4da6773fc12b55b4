"""The throughput benchmark: its arithmetic and the reward of both trainers."""

from __future__ import annotations

import pytest

from tests.benchmarks.throughput import report
from tests.benchmarks.turns import Step, scripted


def test_ratio_is_the_median_of_the_pairs() -> None:
    def step(seconds: float) -> Step:
        return Step(seconds, rollout=seconds / 2, reward=0.0, update=seconds / 2, completion_tokens=100, peak_mib=1.0)

    pairs = [(step(1.0), step(2.0)), (step(9.0), step(3.0)), (step(1.0), step(4.0))]
    found = report({"half_informative": pairs}, {"threads": 2})
    assert found["ratio"] == {"half_informative": 0.5}
    assert found["phases"]["half_informative"]["trl"]["seconds"] == pytest.approx(3.0)
    assert found["phases"]["half_informative"]["dots"]["update"] == pytest.approx(11 / 6)
    assert [pair["dots"]["seconds"] for pair in found["pairs"]] == [1.0, 9.0, 1.0]


def test_rewards_differ_only_where_they_are_to() -> None:
    texts = ["a", "b", "a", "b"]
    rewards = scripted(texts, [True, True, False, False])
    assert rewards[0] != rewards[1]
    assert rewards[2:] == [0.5, 0.5]
