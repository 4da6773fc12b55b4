"""Metrics that reward functions log: averaged over a step's completions, under names of their own."""

from __future__ import annotations

import numpy as np
import pytest

from callbacks import DynamicSampling, Rollouts, RunLedger, WeightSync
from tests.support.scripted_run import HALF, RIGHT, WRONG, scripted_run


def test_a_logged_metric_is_averaged_over_all_completions_of_a_step(tmp_path, monkeypatch):
    patterns = [HALF if i % 3 == 0 else RIGHT if i % 3 == 1 else WRONG for i in range(40)]
    callbacks = [WeightSync(), Rollouts(), DynamicSampling(), RunLedger()]
    run = scripted_run(tmp_path, monkeypatch, patterns, callbacks, function="noted")
    for step in run.steps:
        assert step.metrics["sampling/refills"] > 1
        scores = [group.correctness for group in step.groups + step.dropped + step.surplus]
        assert step.metrics["rewards/noted/right"] == pytest.approx(np.mean(np.concatenate(scores)))


def test_a_logged_metric_replaces_no_other_metric(tmp_path, monkeypatch):
    callbacks = [WeightSync(), Rollouts(), RunLedger()]
    with pytest.warns(UserWarning, match="logs 'mean', but rewards/noted/mean is a metric") as caught:
        run = scripted_run(tmp_path, monkeypatch, [HALF] * 12, callbacks, function="noted")
    assert sum("A reward function logs" in str(one.message) for one in caught) == 1
    for step in run.steps:
        assert step.metrics["reward"] == step.metrics["rewards/noted/mean"] == 0.5
        assert abs(step.metrics["loss"]) < 1
        assert step.metrics["rewards/noted/loss"] == step.metrics["rewards/noted/reward"] == 1234.5
