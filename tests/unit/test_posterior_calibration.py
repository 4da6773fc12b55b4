"""Calibration of P(informative): worlds whose promises are known to be wrong, and the error by hand."""

import numpy as np
import pytest

from datamodules.posterior.calibration import Calibration
from tests.support.selector_builders import saved_and_loaded


def test_before_any_outcome_promises_are_left_as_they_are():
    chance = np.array([0.01, 0.3, 0.9999])
    np.testing.assert_allclose(Calibration().apply(chance), chance, rtol=1e-9)
    assert Calibration().error == 0


def test_the_error_is_that_of_promises_made_before_their_outcomes():
    calibration = Calibration()
    calibration.learn(np.array([0.15, 0.15, 0.85, 0.85]), np.array([0.0, 1.0, 1.0, 1.0]))
    # |0.3 - 1| in the second tenth and |1.7 - 2| in the ninth, of four outcomes.
    assert calibration.error == pytest.approx((0.7 + 0.3) / 4)


@pytest.mark.parametrize(("bias", "slope"), [(-0.9, 0.7), (0.5, 1.4), (0.0, 1.0)])
def test_a_wrong_level_and_a_wrong_sureness_are_learnt(bias, slope):
    rng, calibration = np.random.default_rng(0), Calibration()
    for _ in range(40):
        chance = rng.uniform(0.2, 0.98, 64)
        truth = 1 / (1 + np.exp(-bias - slope * np.log(chance / (1 - chance))))
        calibration.learn(chance, (rng.random(64) < truth).astype(float))
    grid = np.array([0.3, 0.6, 0.9])
    truth = 1 / (1 + np.exp(-bias - slope * np.log(grid / (1 - grid))))
    np.testing.assert_allclose(calibration.apply(grid), truth, atol=0.03)
    assert calibration.error < 0.03


def test_what_changes_is_followed_and_a_restored_one_continues():
    """The world turns from 0.9 to 0.4 informative at the same promise: fifty batches later half is forgotten."""
    rng, one, two = np.random.default_rng(1), Calibration(), Calibration()
    for share in (0.9, 0.4):
        for _ in range(100):
            one.learn(np.full(32, 0.8), (rng.random(32) < share).astype(float))
    assert one.apply(np.array([0.8]))[0] == pytest.approx(0.45, abs=0.1)
    two.load_state_dict(saved_and_loaded(one.state_dict()))
    for each in (one, two):
        each.learn(np.array([0.8, 0.3]), np.array([1.0, 0.0]))
    np.testing.assert_array_equal(one.apply(np.linspace(0, 1, 9)), two.apply(np.linspace(0, 1, 9)))
    assert one.error == two.error
    degenerate = Calibration()
    for _ in range(300):
        degenerate.learn(np.array([0.0, 1.0]), np.array([0.0, 0.0]))
    assert np.isfinite(degenerate.apply(np.array([0.0, 0.5, 1.0]))).all()


def test_very_sure_promises_that_fail_at_first_do_not_upset_what_follows():
    """Two batches promised at 0.9999 are silent; soon after, promises from 0.6 to 0.95 are kept as they were made."""
    rng, calibration = np.random.default_rng(2), Calibration()
    for _ in range(2):
        calibration.learn(np.full(40, 0.9999), np.zeros(40))
    for _ in range(30):
        chance = rng.uniform(0.6, 0.95, 40)
        calibration.learn(chance, (rng.random(40) < chance).astype(float))
    np.testing.assert_allclose(calibration.apply(np.array([0.65, 0.8, 0.9])), [0.65, 0.8, 0.9], atol=0.2)
    assert calibration.error < 0.2
