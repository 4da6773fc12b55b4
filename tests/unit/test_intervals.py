"""Means and their intervals over few runs."""

from __future__ import annotations

import math

import pytest

from app.studies.compare.figures import Interval, geometric_interval, mean_interval, student_t


def test_t_is_that_of_the_printed_tables() -> None:
    assert [round(student_t(dof), 3) for dof in (1, 2, 3, 4, 9, 29, 60)] == [
        12.706, 4.303, 3.182, 2.776, 2.262, 2.045, 2.000,
    ]  # fmt: skip
    assert [round(student_t(dof, 0.99), 3) for dof in (1, 2, 10)] == [63.657, 9.925, 3.169]
    assert student_t(1, 0.5) == pytest.approx(1.0)


def test_interval_of_three_values_by_hand() -> None:
    # s = 1, so half the width is 4.3027 / sqrt(3) = 2.4841.
    found = mean_interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.low == pytest.approx(2 - 2.4841, abs=1e-4)
    assert found.high == pytest.approx(2 + 2.4841, abs=1e-4)


def test_a_single_value_has_no_interval_and_none_has_no_mean() -> None:
    assert mean_interval([0.7]) == Interval(0.7, None, None)
    assert mean_interval([]) == Interval(None, None, None)
    assert geometric_interval([]) == Interval(None, None, None)


def test_half_and_double_cancel_out() -> None:
    found = geometric_interval([0.5, 2.0])
    assert found.mean == pytest.approx(1.0)
    # The logarithms are +-ln 2: s = sqrt(2) ln 2, half the width is 12.706 ln 2.
    assert math.log(found.high or 0) == pytest.approx(12.7062 * math.log(2), rel=1e-5)
    assert (found.low or 0) * (found.high or 0) == pytest.approx(1.0)


def test_upside_down_gives_the_interval_upside_down() -> None:
    ratios = [0.4, 0.5, 0.7]
    found, turned = geometric_interval(ratios), geometric_interval([1 / ratio for ratio in ratios])
    assert found.mean == pytest.approx(1 / (turned.mean or 0))
    assert found.low == pytest.approx(1 / (turned.high or 0))
