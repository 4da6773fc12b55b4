"""The prior from another model's success rates: reading it, its feature, and what it does for the first choices."""

import json

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.mixture import Mixture, named
from datamodules.pool import PromptPool
from datamodules.posterior.model import Constants, PosteriorModel
from datamodules.posterior.prior import SLOPE, read_prior, with_prior
from datamodules.selectors import Posterior, SelectionContext
from datamodules.types import Prompt
from tests.support.selector_builders import outcomes, saved_and_loaded


def pool(rows):
    return PromptPool.of(
        [Prompt(f"p{i}", i, f"question {i}", "", (), columns) for i, columns in enumerate(rows)],
    )


def lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_column_may_lack_some_and_be_written_as_text():
    values = [0, 1.0, "0.25", "3/8", None, "", float("nan")]
    found = read_prior("pass_rate", pool([{"pass_rate": value} for value in values] + [{}]))
    np.testing.assert_array_equal(found, [0, 1, 0.25, 0.375, np.nan, np.nan, np.nan, np.nan])
    nested = pool([{"extra_info": {"pass_rate": 0.5}}, {"extra_info": {}}])
    np.testing.assert_array_equal(read_prior("extra_info.pass_rate", nested), [0.5, np.nan])


def test_a_mixture_has_the_columns_of_its_parts():
    parts = {name: named(pool([{"rate": rate}]), name, None) for name, rate in (("a", 0.5), ("b", 0.75))}
    np.testing.assert_array_equal(read_prior("rate", Mixture(parts)), [0.5, 0.75])


def test_a_file_is_matched_by_question_and_repeats_are_averaged(tmp_path):
    rows = [("question 1", 0.5), (" question 1 ", 1.0), ("question 0", None), ("question 2", 0.25), ("other", 1.0)]
    path = lines(tmp_path / "rates.jsonl", [{"question": text, "pass_rate": rate} for text, rate in rows])
    np.testing.assert_array_equal(read_prior(path, pool([{}] * 4)), [np.nan, 0.75, 0.25, np.nan])


@pytest.mark.parametrize(
    ("prior", "columns", "message"),
    [
        ("pass_rates", {"pass_rate": 0.5, "level": 3}, "neither a JSONL file nor a column .* did you mean 'pass_rate'"),
        ("pass_rate", {"pass_rate": 62.5}, r"prompt 'p1': pass_rate is 62.5, expected a success rate in \[0, 1\]"),
        ("pass_rate", {"pass_rate": "hard"}, "pass_rate is 'hard', expected a success rate"),
        ("pass_rate", {"pass_rate": "3/0"}, "pass_rate is '3/0'"),
        ("pass_rate", {"pass_rate": True}, "pass_rate is True"),
        ("pass_rate", {"pass_rate": [0.5]}, r"pass_rate is \[0.5\]"),
        ("pass_rate", {"pass_rate": None}, "the column 'pass_rate' has a success rate for none of the 2 prompts"),
        ("missing.jsonl", {}, "'missing.jsonl', but there is no such file. Give a JSONL file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(prior, columns, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_prior(prior, pool([dict.fromkeys(columns), columns]))
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match="has a success rate for none of the 2 prompts"):
        read_prior(lines(tmp_path / "a.jsonl", [{"question": "else", "pass_rate": 1}]), pool([{}] * 2))
    with pytest.raises(UserError, match=r"line 1: pass_rate is -0\.5"):
        read_prior(lines(tmp_path / "b.jsonl", [{"question": "else", "pass_rate": -0.5}]), pool([{}] * 2))
    with pytest.raises(UserError, match="line 1 has no 'pass_rate'"):
        read_prior(lines(tmp_path / "c.jsonl", [{"question": "else", "rate": 0.5}]), pool([{}] * 2))


def test_the_feature_is_half_the_log_odds_and_missing_ones_are_told_by_texts():
    features = np.array([[1.0], [1.0], [-1.0], [-1.0], [1.0], [-1.0]], dtype=np.float32)
    rates = np.array([0.75, 0.75, 0.25, 0.25, np.nan, np.nan])
    found = with_prior(features, rates)
    half = np.log(3) / 2
    # Ridge regression on +-1 with four rows and a penalty of 4: half of the difference is believed.
    np.testing.assert_allclose(found[:, 1], [half, half, -half, -half, half / 2, -half / 2], rtol=1e-6)
    np.testing.assert_array_equal(found[:, 0], features[:, 0])
    without_texts = with_prior(np.zeros((3, 0), dtype=np.float32), np.array([1.0, 0.5, np.nan]))
    top = np.log(0.98 / 0.02) / 2
    np.testing.assert_allclose(without_texts[:, 0], [top, 0.0, top / 2], rtol=1e-6)


def test_the_model_expects_the_slope_before_it_has_seen_anything():
    features = np.array([[0.3, 1.0], [0.1, -2.0], [0.0, 0.0]], dtype=np.float32)
    belief = PosteriorModel(features, Constants(), SLOPE).beliefs()
    np.testing.assert_allclose(belief.mean, SLOPE * features[:, 1], rtol=1e-6)


def test_first_choices_follow_the_prior_and_a_resume_continues_them(tmp_path):
    """A model that knows which prompts are of middle difficulty lets the first batch be informative."""
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 4, 300)
    rates = 1 / (1 + np.exp(-log_odds))
    other = 1 / (1 + np.exp(-log_odds - rng.normal(0.5, 1.0, 300)))
    prompts = pool([{"pass_rate": None if i % 5 == 0 else float(rate)} for i, rate in enumerate(other)])
    context, shares = SelectionContext(seed=0, cache_dir=tmp_path), {}
    for prior in ("pass_rate", None):
        one = Posterior(prior=prior, use_embeddings=False)
        one.setup(prompts, context)
        first = prompts.positions(one.choose(40))
        shares[prior] = float(np.mean((rates[first] > 0.1) & (rates[first] < 0.9)))
    # A third of the pool is; a fifth of it has no recorded rate.
    assert shares["pass_rate"] > 0.6
    assert shares[None] < 0.45
    one, two = (Posterior(prior="pass_rate", use_embeddings=False) for _ in range(2))
    for selector in (one, two):
        selector.setup(prompts, context)
    for step in range(3):
        chosen = prompts.positions(one.choose(40))
        one.observe(outcomes(chosen, rng.binomial(8, rates[chosen]) / 8, "fresh", step))
    two.load_state_dict(saved_and_loaded(one.state_dict()))
    assert one.choose(40) == two.choose(40)
    np.testing.assert_array_equal(one.forecast(), two.forecast())
    without = Posterior(use_embeddings=False)
    without.setup(prompts, context)
    with pytest.raises(UserError, match=r"knows 1 features of each prompt, this run has 0\. Resume with the same"):
        without.load_state_dict(saved_and_loaded(one.state_dict()))
