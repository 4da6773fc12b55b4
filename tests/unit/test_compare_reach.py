"""When an accuracy is reached and what that costs, by numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from app.studies.compare.figures import ratio_figures
from app.studies.compare.reach import Course, Ratio, cost_to_reach, goal_accuracy, ratio, smooth


def course(accuracy: list[float], seconds_apart: float, steps_apart: float = 10.0) -> Course:
    places = np.arange(len(accuracy), dtype=float)
    costs = {"time": places * seconds_apart, "steps": places * steps_apart}
    return Course(np.array(accuracy), costs)


BASELINE = course([0.4, 0.5, 0.6, 0.7, 0.7], 100.0)


def test_smoothing_looks_back_over_what_there_is() -> None:
    found = smooth(np.array([0.4, 0.5, 0.6, 0.7, 0.7]), 3)
    assert found == pytest.approx([0.4, 0.45, 0.5, 0.6, 2 / 3])
    assert smooth(BASELINE.accuracy, 1) == pytest.approx(BASELINE.accuracy)


def test_goal_is_the_smoothed_end_or_the_smoothed_best() -> None:
    peaked = course([0.4, 0.8, 0.6], 100.0)
    assert goal_accuracy(peaked, "final", 1) == pytest.approx(0.6)
    assert goal_accuracy(peaked, "best", 1) == pytest.approx(0.8)
    # Smoothed over two: 0.4, 0.6, 0.7: the lone peak is no best.
    assert goal_accuracy(peaked, "best", 2) == pytest.approx(0.7)


@pytest.mark.parametrize(("window", "seconds"), [(1, 300.0), (2, 400.0), (3, 400.0)])
def test_the_baseline_reaches_its_own_end(window: int, seconds: float) -> None:
    # Smoothed over two it goes 0.4, 0.45, 0.55, 0.65, 0.7: there only at its end.
    assert cost_to_reach(BASELINE, "time", goal_accuracy(BASELINE, "final", window), window) == pytest.approx(seconds)


def test_between_evaluations_cost_grows_in_proportion() -> None:
    arm = course([0.4, 0.6, 0.8], 50.0)
    # 0.7 lies half-way between 0.6 (50 s) and 0.8 (100 s); the baseline was there after 300 s and 30 steps.
    assert cost_to_reach(arm, "time", 0.7, 1) == pytest.approx(75.0)
    assert ratio(arm, BASELINE, "time", "final", 1).value == pytest.approx(0.25)
    assert ratio(arm, BASELINE, "steps", "final", 1).value == pytest.approx(15 / 30)
    assert ratio(arm, BASELINE, "time", "final", 1, whole_run=True).value == pytest.approx(75 / 400)


def test_one_lucky_evaluation_is_not_enough() -> None:
    lucky = course([0.4, 0.5, 0.75, 0.5, 0.5], 100.0)
    assert ratio(lucky, BASELINE, "time", "final", 1).reached
    # Over three the best is (0.5 + 0.75 + 0.5) / 3 = 0.583, the goal 2/3.
    assert not ratio(lucky, BASELINE, "time", "final", 3).reached


def test_a_run_that_never_gets_there_is_a_lower_bound() -> None:
    slow = course([0.4, 0.45, 0.5], 100.0)
    assert ratio(slow, BASELINE, "time", "final", 1) == Ratio(200 / 300, False)
    assert ratio(slow, BASELINE, "time", "final", 1, whole_run=True) == Ratio(200 / 400, False)


def test_the_baseline_beside_itself_is_one() -> None:
    assert ratio(BASELINE, BASELINE, "time", "final", 3) == Ratio(1.0, True)
    assert ratio(BASELINE, BASELINE, "steps", "best", 2) == Ratio(1.0, True)


def test_a_baseline_that_ends_where_it_began_has_no_goal() -> None:
    flat = course([0.5, 0.6, 0.5], 100.0)
    assert ratio(BASELINE, flat, "time", "final", 1) == Ratio(None, False)
    assert ratio(BASELINE, flat, "time", "final", 1, whole_run=True) == Ratio(None, False)
    # Its best is above its beginning, so that one can be reached.
    assert ratio(BASELINE, flat, "time", "best", 1).value == pytest.approx(200 / 100)


def test_ratios_of_seeds_are_averaged_as_ratios() -> None:
    found = ratio_figures({0: Ratio(0.5, True), 1: Ratio(2.0, True)})
    assert found["mean"] == pytest.approx(1.0)
    assert (found["reached"], found["censored"], found["undefined"], found["at_least"]) == (2, 0, 0, False)


def test_a_censored_seed_bounds_the_mean_and_takes_the_interval_away() -> None:
    found = ratio_figures({0: Ratio(0.5, True), 1: Ratio(2.0, False), 2: Ratio(None, False)})
    assert found["mean"] == pytest.approx(1.0) and found["ci95"] is None
    assert (found["reached"], found["censored"], found["undefined"], found["at_least"]) == (1, 1, 1, True)
    assert found["per_seed"]["1"] == {"ratio": 2.0, "reached": False}


def test_a_seed_without_a_goal_has_no_mean() -> None:
    found = ratio_figures({0: Ratio(None, False)})
    assert found["mean"] is None and found["ci95"] is None
    assert (found["reached"], found["censored"], found["undefined"]) == (0, 0, 1)
