"""MoPPS: the posterior by hand, the distribution of the Thompson draw and the window over the shuffled pool."""

import json
import math

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.seeding import generator
from datamodules.selectors import Mopps, SelectionContext
from datamodules.types import Outcomes
from tests.support.selector_builders import chosen, outcomes, pool_of, ready, saved_and_loaded


def test_the_posterior_by_hand():
    mopps = ready(Mopps(decay=0.5, prior_successes=2, prior_failures=1), 4)
    assert mopps.forecast().tolist() == [2 / 3] * 4
    mopps.observe(outcomes([1, 2], [0.25, 1.0]))  # of 8 each
    # a = 0.5 * 2 + 0.5 * 2 + 2 = 4, b = 0.5 + 0.5 + 6 = 7; a = 2 + 8, b = 1
    np.testing.assert_allclose(mopps.forecast(), [2 / 3, 4 / 11, 10 / 11, 2 / 3])
    mopps.observe(Outcomes(1, ["p1"], np.array([0.5]), np.array([4]), "reference", np.array([0.5])))
    # a = 0.5 * 4 + 0.5 * 2 + 2 = 5, b = 0.5 * 7 + 0.5 * 1 + 2 = 6; the others keep theirs
    np.testing.assert_allclose(mopps.forecast(), [2 / 3, 5 / 11, 10 / 11, 2 / 3])
    std = [math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1))) for a, b in ((2, 1), (5, 6), (10, 1), (2, 1))]
    assert mopps.metrics()["selection/posterior_mean"] == pytest.approx(np.mean([2 / 3, 5 / 11, 10 / 11, 2 / 3]))
    assert mopps.metrics()["selection/posterior_std"] == pytest.approx(np.mean(std))


def test_without_decay_every_completion_counts():
    mopps = ready(Mopps(), 3)
    for rate in (0.0, 0.5, 0.25):
        mopps.observe(outcomes([0], [rate]))
    assert mopps.forecast()[0] == pytest.approx((1 + 0 + 4 + 2) / (2 + 24))


def beta_cdf(a, b, at):
    grid = np.linspace(0, at, 20001)
    density = grid ** (a - 1) * (1 - grid) ** (b - 1)
    norm = math.gamma(a) * math.gamma(b) / math.gamma(a + b)
    return float(np.sum((density[1:] + density[:-1]) / 2 * np.diff(grid)) / norm)


def test_the_thompson_draw_has_the_posterior_distribution():
    """Priority -|theta - target| under Beta(3, 7) and Beta(9, 1), against the integral of the density."""
    mopps = ready(Mopps(target=0.4), 2)
    mopps.observe(outcomes([0, 1], [0.25, 1.0]))
    draws, rng = 20000, np.random.default_rng(0)
    found = -np.array([mopps.priorities(1, rng) for _ in range(draws)])
    for position, (a, b) in enumerate(((3, 7), (9, 1))):
        for distance in (0.05, 0.1, 0.2, 0.35, 0.5):
            expected = beta_cdf(a, b, min(0.4 + distance, 1.0)) - beta_cdf(a, b, max(0.4 - distance, 0.0))
            share = np.mean(found[:, position] <= distance)
            assert abs(share - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws) + 1e-6


def test_it_takes_the_nearest_to_the_target_when_the_posterior_is_sharp():
    mopps = ready(Mopps(target=0.5, candidates=0), 100)
    rates = np.random.default_rng(0).permutation(100) / 99
    for _ in range(4000):
        mopps.learn(np.arange(100), outcomes(range(100), rates))
    nearest = np.argsort(np.abs(rates - 0.5))
    assert set(chosen(mopps, 6)) <= set(nearest[:8])


def test_the_threshold_strategy_draws_in_its_band_then_next_to_it():
    """With posteriors as sharp as points the sampled rates are 0, 0.1, ... 0.9."""
    rates = np.arange(10) / 10

    def sharp(strategy, size=10, **options):
        mopps = ready(Mopps(strategy=strategy, candidates=0, **options), size)
        mopps._counts = np.stack([rates, 1 - rates]) * 1e12 + 1e-3
        return mopps

    mopps = sharp("threshold", lower=0.25, upper=0.65)
    np.testing.assert_allclose(  # by hand: 0 within, else the distance to the nearer end
        -mopps.priorities(4, np.random.default_rng(0)),
        [0.25, 0.15, 0.05, 0, 0, 0, 0, 0.05, 0.15, 0.25],
        atol=1e-5,
    )
    # Four prompts lie in the band: each two of them are as likely as any two others, where "topk" takes 0.4 and 0.5.
    pairs = {tuple(sorted(chosen(mopps, 2))) for _ in range(200)}
    assert pairs == {(3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (5, 6)}
    assert {3, 4, 5, 6} <= set(chosen(mopps, 5)) <= {2, 3, 4, 5, 6, 7}
    assert set(chosen(sharp("topk", target=0.44), 2)) == {4, 5}
    assert set(chosen(sharp("threshold", lower=0.2, upper=0.2), 1)) == {2}


def test_rates_measured_before_start_the_posterior(tmp_path, caplog):
    """Of five questions the record knows three, the JSON of scores by id two, as the authors write them."""
    record, scores = tmp_path / "rates.jsonl", tmp_path / "index_score.json"
    rows = [
        {"question": "a  b", "pass_rate": 0.25},
        {"question": "c", "pass_rate": 1.0},
        {"question": "d", "pass_rate": 0},
    ]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scores.write_text('{"p1": [1, 0, 0, 1], "p4": 0.25, "other": [0]}')
    pool = pool_of(["a b", "x", "c", "d", "y"])
    mopps = Mopps(decay=0.5, offline=str(record), offline_weight=8)
    mopps.setup(pool, SelectionContext(0))
    # (1 + 2) / 10, (1 + 8) / 10, 1 / 10, and the prior's mean where nothing is known.
    np.testing.assert_allclose(mopps.forecast(), [0.3, 0.5, 0.9, 0.1, 0.5])
    assert "rates of 3 of 5 prompts" in caplog.text
    mopps.observe(outcomes([0], [1.0]))
    # a = 0.5 * 3 + 0.5 * 1 + 8 = 10, b = 0.5 * 7 + 0.5 * 1 = 4: forgetting returns to the prior, not to the record.
    assert mopps.forecast()[0] == pytest.approx(10 / 14)
    again = Mopps(decay=0.5, offline=str(record), offline_weight=8)
    again.setup(pool, SelectionContext(0))
    again.load_state_dict(saved_and_loaded(mopps.state_dict()))
    np.testing.assert_array_equal(again.forecast(), mopps.forecast())
    by_id = Mopps(offline=str(scores))  # 24 completions
    by_id.setup(pool, SelectionContext(0))
    np.testing.assert_allclose(by_id.forecast(), [0.5, 13 / 26, 0.5, 0.5, 7 / 26])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "does not exist"),
        ("none.json", None, "cannot be read"),
        ("list.json", "[1]", "is not an object"),
        ("text.json", '{"p0": "often"}', "expected a rate or a list of scores"),
        ("counts.json", '{"p0": [3, 1]}', "expected a rate or a list of scores"),
        ("empty.json", '{"p0": []}', "expected a rate or a list of scores"),
        ("others.json", '{"q0": [1]}', "of none of the 2 training prompts"),
        ("others.jsonl", '{"question": "z", "pass_rate": 1}', "of none of the 2 training prompts"),
    ],
)
def test_an_unusable_record_is_a_one_line_error(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        ready(Mopps(offline=str(tmp_path / name)), 2)


def test_candidates_are_the_next_of_the_shuffled_passes():
    size, n, multiple = 30, 3, 4
    mopps = ready(Mopps(candidates=multiple), size, seed=11)
    row = np.concatenate([generator(11, "Mopps", "pass", number).permutation(size) for number in range(5)])
    seen = set()
    for visit in range(10):
        window = row[visit * n * multiple : (visit + 1) * n * multiple]
        taken = chosen(mopps, n)
        assert set(taken) <= set(window)
        seen |= set(taken)
    assert len(seen) > 15
    narrow = ready(Mopps(candidates=1), size, seed=11)
    assert [sorted(chosen(narrow, 3)) for _ in range(10)] == [sorted(row[i : i + 3]) for i in range(0, 30, 3)]


def test_what_follows_the_candidates_fills_up_and_a_refill_moves_on():
    size = 30
    row = generator(11, "Mopps", "pass", 0).permutation(size)
    mopps = ready(Mopps(candidates=2), size, seed=11)
    first = chosen(mopps, 4, exclude=[f"p{i}" for i in row[:7]])
    assert first.tolist() == [row[7], *row[8:11]]  # one candidate is left, then the next in order
    assert set(chosen(mopps, 3, refill=True)) <= set(row[8:14]) - set(first)


def test_wrong_arguments_are_one_line_errors():
    for arguments, message in (
        ({"target": -0.1}, r"target is -0\.1"),
        ({"decay": 1.5}, r"decay is 1\.5"),
        ({"prior_failures": 0.0}, r"prior_failures=0\.0"),
        ({"candidates": -1}, "candidates is -1"),
        ({"strategy": "treshold"}, "did you mean 'threshold'"),
        ({"lower": 0.8}, r"lower=0\.8 and upper=0\.7"),
        ({"offline_weight": -1.0}, r"offline_weight is -1\.0"),
    ):
        with pytest.raises(UserError, match=message):
            Mopps(**arguments)


def test_a_shaped_correctness_reward_adds_no_more_than_its_completions():
    mopps = ready(Mopps(), 3)
    mopps.observe(outcomes([0, 1], [1.5, -0.5]))  # of 8 each: (a, b) = (1 + 8, 1 + 0) and (1 + 0, 1 + 8)
    np.testing.assert_allclose(mopps.forecast(), [0.9, 0.1, 0.5])
