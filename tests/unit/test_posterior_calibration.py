"""Calibration of P(informative): worlds whose promises are known to be wrong, a general optimiser, errors by hand."""

import numpy as np
import pytest
from scipy.optimize import minimize

import datamodules.posterior.calibration as calibrated
from datamodules.posterior.calibration import Calibration, design
from tests.support.selector_builders import saved_and_loaded


def rows(chance, mean=0.0, rested=0.0):
    chance = np.asarray(chance, dtype=float)
    return design(chance, np.broadcast_to(mean, chance.shape), np.broadcast_to(rested, chance.shape))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_before_any_outcome_a_promise_is_that_of_the_model_with_a_shift_of_the_batch():
    chance, shift = np.array([0.01, 0.3, 0.5, 0.9, 0.9999]), np.linspace(-5, 5, 2001)
    weight = np.exp(-0.5 * shift**2 / Calibration().variance[0])
    expected = sigmoid(np.log(chance / (1 - chance))[:, None] + shift) @ weight / weight.sum()
    for mean, rested in ((0.0, 0.0), (2.0, 9.0)):
        np.testing.assert_allclose(Calibration().apply(rows(chance, mean, rested)), expected, atol=0.01)
    assert Calibration().error == 0


def test_the_error_is_that_of_promises_made_before_their_outcomes():
    calibration = Calibration()
    promised = calibration.apply(rows([0.15, 0.85]))
    assert 0.1 < promised[0] < 0.2 and 0.8 < promised[1] < 0.9
    calibration.learn(rows([0.15, 0.15, 0.85, 0.85]), np.array([0.0, 1.0, 1.0, 1.0]))
    # One of two in the second tenth, both in the ninth, of four outcomes.
    assert calibration.error == pytest.approx(((1 - 2 * promised[0]) + (2 - 2 * promised[1])) / 4)


def test_a_batch_is_learnt_from_as_a_general_optimiser_would():
    """The mode of weights and shift together, the inverse of their covariance's block without the shift, the evidence.

    Nothing is forgotten before the first batch, so all rates learn alike from it.
    """
    rng, calibration = np.random.default_rng(3), Calibration()
    given = rows(rng.uniform(0.1, 0.95, 60), rng.normal(0, 2, 60), rng.integers(0, 20, 60))
    outcomes = (rng.random(60) < 0.4).astype(float)
    columns = np.concatenate([given, np.ones((60, 1))], axis=1)
    centre, prior = np.array([0, 1, 0, 0, 0.0]), np.diag([2, 2, 2, 2, 1 / calibration.variance[0]])

    def loss(weights):
        x, off = columns @ weights, weights - centre
        return np.logaddexp(0, x).sum() - outcomes @ x + 0.5 * off @ prior @ off

    found = minimize(loss, centre, method="BFGS", options={"gtol": 1e-9}).x
    calibration.learn(given, outcomes)
    chance = sigmoid(columns @ found)
    covariance = np.linalg.inv((columns.T * (chance * (1 - chance))) @ columns + prior)
    for weights, precision in zip(calibration.weights, calibration.precision, strict=True):
        np.testing.assert_allclose(weights, found[:4], atol=1e-5)
        np.testing.assert_allclose(np.linalg.inv(precision), covariance[:4, :4], rtol=1e-3, atol=1e-6)
    drawn = rng.multivariate_normal(centre, np.linalg.inv(prior), size=50_000) @ columns.T
    likelihoods = drawn @ outcomes - np.logaddexp(0, drawn).sum(axis=1)
    np.testing.assert_allclose(calibration.evidence, np.logaddexp.reduce(likelihoods) - np.log(50_000), atol=0.2)


@pytest.mark.parametrize(("bias", "slope"), [(-0.9, 0.7), (0.5, 1.4), (0.0, 1.0)])
def test_a_wrong_level_and_a_wrong_sureness_are_learnt(bias, slope):
    rng, calibration = np.random.default_rng(0), Calibration()
    for _ in range(40):
        chance = rng.uniform(0.2, 0.98, 64)
        truth = sigmoid(bias + slope * np.log(chance / (1 - chance)))
        calibration.learn(rows(chance), (rng.random(64) < truth).astype(float))
    grid = np.array([0.3, 0.6, 0.9])
    truth = sigmoid(bias + slope * np.log(grid / (1 - grid)))
    np.testing.assert_allclose(calibration.apply(rows(grid)), truth, atol=0.05)
    assert calibration.error < 0.03


def test_a_large_batch_is_not_hundreds_of_proofs():
    """The batches swing by a shift of their own: one of 256 that goes wrong moves the next promise halfway at most."""
    calibration = Calibration()
    calibration.learn(rows(np.full(256, 0.6)), np.repeat([1.0, 0.0], [26, 230]))
    assert 0.25 < calibration.apply(rows([0.6]))[0] < 0.5


@pytest.mark.parametrize("deviation", [0.0, 0.7])
def test_how_much_batches_shift_is_learnt_and_the_promise_is_that_of_the_mean_batch(deviation):
    rng, calibration, found = np.random.default_rng(5), Calibration(), []
    for shift in deviation * rng.normal(size=150):
        chance = rng.uniform(0.3, 0.9, 128)
        found.append(sigmoid(np.log(chance / (1 - chance)) + shift))
        calibration.learn(rows(chance), (rng.random(128) < found[-1]).astype(float))
    assert calibration.shares @ calibration.variance == pytest.approx(deviation**2, abs=0.15)
    promised = calibration.apply(rows(rng.uniform(0.3, 0.9, 4096))).mean()
    assert promised == pytest.approx(np.mean(found), abs=0.02 if deviation == 0 else 0.05)


def test_what_the_model_thinks_of_rested_and_of_mastered_prompts_is_corrected():
    """Promised 0.7 alike, 0.8 of the others keep it, 0.35 of what was mastered or rested for 20 steps, 0.07 of both."""
    rng, calibration = np.random.default_rng(6), Calibration()
    for _ in range(40):
        mean, rested = rng.choice([-2.0, 2.0], 48), rng.choice([0.0, 20.0], 48)
        truth = sigmoid(1.4 - 2.0 * (mean > 0) - 2.0 * (rested > 0))
        calibration.learn(rows(np.full(48, 0.7), mean, rested), (rng.random(48) < truth).astype(float))
    promised = calibration.apply(rows(np.full(3, 0.7), np.array([-2.0, 2.0, -2.0]), np.array([0.0, 0.0, 20.0])))
    np.testing.assert_allclose(promised, [0.8, 0.35, 0.35], atol=0.1)
    assert calibration.error < 0.05


def test_what_changes_is_followed_and_a_restored_one_continues():
    """The world turns from 0.9 to 0.4 informative at the same promise: ten batches later that is known."""
    rng, one, two = np.random.default_rng(1), Calibration(), Calibration()
    for share, batches in ((0.9, 100), (0.4, 10)):
        for _ in range(batches):
            one.learn(rows(np.full(32, 0.8)), (rng.random(32) < share).astype(float))
    assert one.apply(rows([0.8]))[0] == pytest.approx(0.4, abs=0.1)
    two.load_state_dict(saved_and_loaded(one.state_dict()))
    for each in (one, two):
        each.learn(rows([0.8, 0.3]), np.array([1.0, 0.0]))
    grid = rows(np.linspace(0, 1, 9), np.linspace(-9, 9, 9), np.arange(9))
    np.testing.assert_array_equal(one.apply(grid), two.apply(grid))
    assert one.error == two.error
    degenerate = Calibration()
    for _ in range(300):
        degenerate.learn(rows([0.0, 1.0]), np.array([0.0, 0.0]))
    assert np.isfinite(degenerate.apply(grid)).all()


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_how_fast_to_forget_is_learnt(drift, monkeypatch):
    """Small batches in a steady world and in one whose level wanders: promises as good as with the best single rate."""

    def missed():
        rng, calibration, level, found = np.random.default_rng(4), Calibration(), 0.0, []
        for _ in range(400):
            level = 0.98 * level + drift * rng.normal()
            chance = rng.uniform(0.2, 0.9, 8)
            truth = sigmoid(level + np.log(chance / (1 - chance)))
            found.append(np.square(calibration.apply(rows(chance)) - truth).mean())
            calibration.learn(rows(chance), (rng.random(8) < truth).astype(float))
        return np.sqrt(np.mean(found[50:]))

    learnt, singles = missed(), []
    for rate in calibrated.KEPT:
        monkeypatch.setattr(calibrated, "KEPT", np.array([rate]))
        singles.append(missed())
    assert learnt < 1.1 * min(singles) < 0.85 * max(singles)


def test_very_sure_promises_that_fail_at_first_do_not_upset_what_follows():
    """Two batches promised at 0.9999 are silent; soon after, promises from 0.6 to 0.95 are kept as they were made."""
    rng, calibration = np.random.default_rng(2), Calibration()
    for _ in range(2):
        calibration.learn(rows(np.full(40, 0.9999)), np.zeros(40))
    for _ in range(30):
        chance = rng.uniform(0.6, 0.95, 40)
        calibration.learn(rows(chance), (rng.random(40) < chance).astype(float))
    np.testing.assert_allclose(calibration.apply(rows([0.65, 0.8, 0.9])), [0.65, 0.8, 0.9], atol=0.2)
    assert calibration.error < 0.2
