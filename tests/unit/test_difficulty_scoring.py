"""Figures of difficulty forecasts against scipy and numbers worked by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from app.reporting.forecast_quality import reliability, spearman
from app.studies.difficulty.forecasters import score
from datamodules.difficulty.encoders import STATISTICS_WIDTH, block_widths, embed_with, encoder_parts, statistics
from datamodules.difficulty.outcomes import RecordedOutcomes
from datamodules.errors import UserError


@pytest.mark.parametrize("seed", range(4))
def test_spearman_against_scipy_with_ties(seed):
    rng = np.random.default_rng(seed)
    forecast = np.round(rng.uniform(size=60), 1)
    measured = rng.binomial(8, np.clip(forecast, 0, 1)) / 8
    assert spearman(forecast, measured) == pytest.approx(spearmanr(forecast, measured).statistic, abs=1e-12)
    assert np.isnan(spearman(np.zeros(5), measured[:5]))


def test_figures_by_hand():
    # Bins of 0.1: 0.2 and 0.26 (measured mean 0.5, forecast mean 0.23), 0.9 twice (0.75 against 0.9).
    forecast, measured = np.array([0.2, 0.26, 0.9, 0.9]), np.array([0.0, 1.0, 1.0, 0.5])
    assert reliability(forecast, measured).error == pytest.approx((0.27 + 0.15) / 2)


def test_score_sees_only_references_of_the_same_visit():
    rng = np.random.default_rng(0)
    rates = rng.uniform(size=(60, 3)).astype(np.float32)
    rates[:40, 1] = np.nan
    rates[:, 2] = np.nan
    outcomes = RecordedOutcomes([f"q{i}" for i in range(60)], rates)
    tested, candidates = np.arange(45, 60), np.arange(45)
    asked = []

    def forecaster(rows, values):
        asked.append(rows)
        visit = 0 if len(rows) == 20 else 1
        np.testing.assert_array_equal(values, rates[rows, visit].astype(np.float64))
        return np.linspace(0, 1, 60)

    scored = score(forecaster, outcomes, tested, candidates, references=20, seed=3)
    assert [len(rows) for rows in asked] == [20, 5]
    assert set(asked[1]) == set(range(40, 45))
    expected = np.linspace(0, 1, 60)[45:]
    np.testing.assert_array_equal(scored.forecast, np.tile(expected, 2))
    np.testing.assert_array_equal(scored.measured, np.concatenate([rates[45:, 0], rates[45:, 1]]))
    by_visit = [np.corrcoef(expected, rates[45:, visit])[0, 1] for visit in (0, 1)]
    assert scored.pearson == pytest.approx(np.mean(by_visit))
    assert scored.figures["brier"] == pytest.approx(np.mean((scored.forecast - scored.measured) ** 2))


def test_references_among_the_tested_are_not_scored():
    outcomes = RecordedOutcomes([f"q{i}" for i in range(40)], np.linspace(0, 1, 40, dtype=np.float32)[:, None])
    drawn = []

    def forecaster(rows, values):
        drawn.extend(rows)
        return np.arange(40) / 40

    scored = score(forecaster, outcomes, np.arange(40), np.arange(40), references=256, seed=0)
    assert len(drawn) == 20
    assert not {round(40 * value) for value in scored.forecast} & set(drawn)
    assert len(scored.forecast) == 20


def test_statistics_by_hand():
    found = np.expm1(statistics("If $x^2=49$, find \\frac{x}{120}.\nWhy?"))
    # Characters, words, sentence ends, numbers, longest number, largest, mean length of words of three letters or more
    # (find, frac, Why), then $ \ \frac newline = , ^ (.
    assert found[:-1] == pytest.approx([37, 5, 2, 3, 3, 120, 11 / 3, 2, 1, 1, 1, 1, 1, 1, 0])
    assert statistics("If $x$")[-1] == 1 and statistics("none")[-1] == 0


def test_joined_encoders_keep_their_blocks(tmp_path):
    questions = ["What is 3 + 4?", "Find $x$.", ""]
    joined, key = embed_with("statistics + statistics", questions, tmp_path)
    alone, alone_key = embed_with("statistics", questions, tmp_path)
    np.testing.assert_array_equal(joined, np.concatenate([alone, alone], axis=1))
    np.testing.assert_allclose(alone, [statistics(question) for question in questions], rtol=1e-6)
    assert key != alone_key
    assert block_widths("statistics+statistics", questions, tmp_path) == [STATISTICS_WIDTH, STATISTICS_WIDTH]
    with pytest.raises(UserError, match="empty part"):
        embed_with("statistics+", questions, tmp_path)
    (tmp_path / "a+b").mkdir()
    assert encoder_parts(str(tmp_path / "a+b")) == [str(tmp_path / "a+b")]
