"""Metrics and pictures that compare forecasts with outcomes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from app.reporting.forecast_quality import informative_probability, reliability
from app.reporting.pictures import pixels, reliability_figure, scatter_figure
from callbacks.watching.selection_monitor import UniformShare, chosen_groups, forecast_pairs
from datamodules.types import TrainBatch
from tests.support.builders import group, prompt


@pytest.mark.parametrize("success", [0.0, 0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("samples", [1, 2, 5])
def test_the_chance_of_a_mixed_group_is_the_sum_over_all_outcomes(success, samples):
    total = 0.0
    for outcome in itertools.product([0, 1], repeat=samples):
        if len(set(outcome)) > 1:
            total += math.prod(success if one else 1 - success for one in outcome)
    assert informative_probability(np.array([success]), samples)[0] == pytest.approx(total, abs=1e-12)


def test_forecasts_are_binned_by_size():
    forecast = np.array([0.05, 0.15, 0.15, 0.15, 0.95, 1.0])
    measured = np.array([0.0, 0.5, 0.25, 0.0, 0.75, 1.0])
    table = reliability(forecast, measured, bins=10)
    np.testing.assert_array_equal(table.count, [1, 3, 2])
    np.testing.assert_allclose(table.forecast, [0.05, 0.15, 0.975])
    np.testing.assert_allclose(table.measured, [0.0, 0.25, 0.875])
    # Of (0.5, 0.25, 0): unbiased standard deviation 0.25, over sqrt(3); of (0.75, 1): 0.17678 over sqrt(2).
    np.testing.assert_allclose(table.standard_error, [0.0, 0.25 / math.sqrt(3), 0.125])
    assert table.error == pytest.approx((1 * 0.05 + 3 * 0.10 + 2 * 0.10) / 6)


def test_a_perfect_forecast_has_no_calibration_error():
    rates = np.linspace(0, 1, 33)
    assert reliability(rates, rates).error == pytest.approx(0, abs=1e-12)
    assert reliability(np.full(5, 0.5), np.array([0, 0, 0.5, 1, 1])).error == pytest.approx(0)
    assert math.isnan(reliability(np.empty(0), np.empty(0)).error)


def test_only_prompts_rolled_out_for_the_step_are_compared_with_their_forecast():
    batch = TrainBatch(4, [prompt(i) for i in range(6)], np.array([0.1, 0.2, 0.3, np.nan, 0.5, 0.6]))
    batch.add([group(prompt(1), [0, 0]), group(prompt(5), [])], "dropped")
    batch.add([group(prompt(3), [0, 1]), group(prompt(9), [0, 1], source="reference")], "surplus")
    trained = [(0, [0, 1], "fresh"), (2, [1, 1], "reference"), (4, [0, 1], "replay")]
    batch.add(group(prompt(index), rewards, source=source) for index, rewards, source in trained)
    groups = chosen_groups(batch)
    # Not the replayed one, not the one without scores, not the reference that was not chosen.
    assert [one.prompt.id for one in groups] == ["p0", "p2", "p1", "p3"]
    # Not the reference that the selector had seen, nor the one chosen before there was a forecast.
    np.testing.assert_array_equal(forecast_pairs(batch, groups), [[0.1, 0.5], [0.2, 0.0]])
    assert forecast_pairs(TrainBatch(0, [prompt(0)]), [group(prompt(0), [0, 1])]).shape == (0, 2)


def test_the_uniform_share_forgets_slowly_and_survives_a_resume():
    share = UniformShare()
    assert math.isnan(share.share)
    share.step([True, False, False, False])
    assert share.share == pytest.approx(0.25)
    share.step([])
    assert share.share == pytest.approx(0.25)
    restored = UniformShare()
    restored.load_state_dict(share.state_dict())
    for one in (share, restored):
        one.step([True, True])
        # (1 * 0.81 + 2) / (4 * 0.81 + 2)
        assert one.share == pytest.approx(2.81 / 5.24)


def test_dots_lie_at_forecast_and_outcome():
    blank = pixels(scatter_figure(np.array([2.0]), np.array([2.0]), "t")).astype(int)
    for forecast, measured in ((0.25, 0.75), (0.5, 0.5), (1.0, 0.0)):
        figure = scatter_figure(np.array([forecast]), np.array([measured]), "t")
        drawn = pixels(figure).astype(int)
        assert drawn.dtype == int and drawn.shape == (400, 420, 3)
        x, y = figure.axes[0].transData.transform((forecast, measured))
        window = (slice(400 - round(y) - 9, 400 - round(y) + 9), slice(round(x) - 3, round(x) + 3))
        assert np.abs(drawn - blank)[window].max() > 40
        # Nothing else changed inside the axes: mask the dot and compare there.
        changed = np.abs(drawn - blank).sum(2)
        changed[window] = 0
        assert changed[60:340, 70:400].max() == 0


def test_the_reliability_picture_draws_the_table():
    rng = np.random.default_rng(0)
    forecast = rng.random(500)
    measured = (rng.random(500) < forecast).astype(float)
    figure = reliability_figure(forecast, measured, "steps up to 9", bins=10)
    table = reliability(forecast, measured, 10)
    (line,) = (one for one in figure.axes[0].lines if one.get_marker() == "o")
    np.testing.assert_allclose(line.get_xydata(), np.stack([table.forecast, table.measured], 1))
    (label,) = figure.axes[0].get_legend_handles_labels()[1]
    assert label == f"chosen: N 500, ECE {table.error:.3f}"
    heights = [bar.get_height() for bar in figure.axes[1].patches]
    np.testing.assert_array_equal(heights, table.count)


def test_uniform_references_are_drawn_next_to_the_chosen_prompts():
    chosen, uniform = np.array([0.5, 0.5]), np.array([[0.1, 0.0], [0.9, 1.0], [0.5, 0.2]])
    figure = scatter_figure(chosen, np.array([0.0, 1.0]), "t", uniform)
    labels = figure.axes[0].get_legend_handles_labels()[1]
    # References: errors of 0.1, 0.1 and 0.3; a constant forecast correlates with nothing.
    correlation = np.corrcoef(*uniform.T)[0, 1]
    assert labels[0] == f"uniform references: N 3, Pearson {correlation:.2f}, Brier {(0.01 + 0.01 + 0.09) / 3:.3f}"
    assert labels[1] == "chosen: N 2, Pearson -, Brier 0.250"
    only = reliability_figure(np.empty(0), np.empty(0), "t", uniform=uniform)
    (label,) = only.axes[0].get_legend_handles_labels()[1]
    assert label.startswith("uniform references: N 3, ECE")
