"""GRESO: skip probabilities, their adjustment and the adaptive batch, by hand over a scripted history."""

import math

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.selectors import Composed, Greso, Mopps, Selector, Uniform, ZeroVarianceSkip
from tests.support.selector_builders import chosen, outcomes, ready

HISTORIES = {
    # success rates of a prompt's groups, oldest first -> probability of keeping it at p_easy 0.5, p_hard 0.4
    (): 1.0,
    (0.5,): 1.0,
    (1.0,): 0.5,
    (0.0,): 0.4,
    (1.0, 1.0, 1.0): 0.125,
    (0.0, 0.0): 0.16,
    (1.0, 1.0, 0.0): 0.4,
    (0.0, 0.0, 1.0): 0.5,
    (1.0, 1.0, 0.875): 1.0,
    (0.0, 0.25, 0.0): 0.4,
    (1.0,) * 6: 0.015625,
    (1.0,) * 7: 0.01,
    (0.0,) * 30: 0.01,
}


def learnt(selector):
    for visit in range(30):
        at = [(position, past[visit]) for position, past in enumerate(HISTORIES) if len(past) > visit]
        if at:
            selector.observe(outcomes([position for position, _ in at], [rate for _, rate in at], step=visit))
    return selector


def test_keep_probabilities_by_hand():
    greso = learnt(ready(Greso(p_easy=0.5, p_hard=0.4), len(HISTORIES)))
    np.testing.assert_allclose(greso.skip.keep_probability(), list(HISTORIES.values()), rtol=1e-12)
    assert greso.metrics()["selection/skip_fraction"] == pytest.approx(1 - np.mean(list(HISTORIES.values())))


def test_prompts_are_admitted_with_their_probability():
    greso = learnt(ready(Greso(p_easy=0.5, p_hard=0.4), len(HISTORIES)))
    draws, rng = 20000, np.random.default_rng(0)
    found = np.mean([greso.skip.admits(rng) for _ in range(draws)], axis=0)
    expected = np.array(list(HISTORIES.values()))
    assert (np.abs(found - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / draws)).all()


def test_probabilities_follow_the_shares_after_the_first_epoch():
    """Pool of 12, four groups a step: three steps make the first epoch."""
    greso = ready(Greso(), 12)
    easy, hard, some = 1.0, 0.0, 0.5
    script = [
        # rates of a step's four groups -> (p_easy, p_hard) in the step after it
        ([easy, easy, hard, hard], (0.5, 0.5)),
        ([some, some, some, some], (0.5, 0.5)),
        ([easy, easy, easy, hard], (0.5, 0.5)),
        ([easy, some, some, some], (0.49, 0.51)),  # easy 1/4 >= 1/12, hard 0 < 1/6
        ([hard, hard, some, some], (0.50, 0.50)),
        ([easy, hard, some, some], (0.49, 0.49)),
        ([some, some, some, some], (0.50, 0.50)),
    ]
    for step, (rates, expected) in enumerate(script):
        greso.choose(4)
        greso.observe(outcomes(range(4), rates, step=step))
        greso.observe(outcomes(range(4, 8), [easy] * 4, "reference", step=step))  # not rollouts of chosen prompts
        greso.begin_step()
        assert (greso.skip.p_easy, greso.skip.p_hard) == pytest.approx(expected)
        assert greso.metrics()["selection/p_easy"] == pytest.approx(expected[0])
    assert greso.skip.keep_probability()[4] == max(greso.skip.p_easy**7, 0.01)  # references extend the runs


def test_shares_are_of_the_whole_step_refills_included_and_stand_at_the_target():
    skip = ZeroVarianceSkip(target_easy=0.25, target_hard=0.5)
    greso = ready(Composed(Uniform(), [skip]), 4)
    for rates in ([0.5] * 4, [1.0, 0.0, 0.5, 0.5], [0.5] * 4):
        greso.choose(4)
        greso.observe(outcomes(range(2), rates[:2]))
        greso.observe(outcomes(range(2, 4), rates[2:]))
    assert (skip.p_easy, skip.p_hard) == pytest.approx((0.49, 0.51))  # 1/4 is at its target, 1/4 < 1/2


def test_probabilities_stay_within_their_bounds():
    greso = ready(Greso(step_size=0.2), 2)
    for _ in range(8):
        greso.choose(2)
        greso.observe(outcomes([0, 1], [1.0, 1.0]))
    assert (greso.skip.p_easy, greso.skip.p_hard) == (0.05, 0.95)


def test_adaptive_batch_by_hand():
    greso = Greso()
    cases = [
        # missing, default, kept -> requested
        ((40, 384, 0.5), 100),  # 1.25 * 40 / 0.5
        ((70, 384, 0.7), 125),
        ((71, 384, 0.7), 127),  # 126.8
        ((10, 384, 0.8), 64),  # 15.6
        ((200, 384, 0.5), 384),  # 500
        ((10, 32, 0.8), 32),
        ((40, 384, 0.0), 384),  # every group had zero variance
        ((40, 384, 1.0), 64),
    ]
    for arguments, expected in cases:
        assert greso.refill_size(*arguments) == expected
    assert Greso(min_refill=8).refill_size(10, 384, 0.8) == 16
    for other in (Uniform(), Mopps(), Composed(Uniform())):
        assert isinstance(other, Selector)
        assert other.refill_size(40, 384, 0.5) == 40
        assert other.refill_size(400, 384, 0.5) == 384


def test_every_prompt_is_met_once_per_pass():
    size = 4000
    greso = ready(Greso(), size)
    greso.skip.step_size = 0.0
    for first in range(0, size, 100):
        taken = chosen(greso, 100)
        greso.observe(outcomes(taken, np.ones(100)))
        assert greso.metrics()["selection/pool_epoch"] == (first + 100) / size  # a prompt never seen is not skipped
    second: list[int] = []
    while (epoch := greso.metrics()["selection/pool_epoch"]) < 1.9:
        second += chosen(greso, 50).tolist()
    assert len(set(second)) == len(second)
    met = (epoch - 1) * size
    assert abs(len(second) - met / 2) < 4.5 * math.sqrt(met / 4)
    assert greso.metrics()["selection/fallback_fraction"] == 0


def test_the_skip_rule_works_around_another_ranker():
    plain, skipping = ready(Mopps(), 300), ready(Composed(Mopps(), filters=[ZeroVarianceSkip(p_hard=0.05)]), 300)
    for selector in (plain, skipping):
        selector.observe(outcomes(range(200), np.zeros(200)))
    picks = [np.mean([np.mean(chosen(one, 20) < 200) for _ in range(40)]) for one in (plain, skipping)]
    assert picks[1] < 0.2 * picks[0]


def test_wrong_arguments_are_one_line_errors():
    for arguments, message in (
        ({"p_easy": 0.99}, r"p_easy is 0\.99"),
        ({"p_hard": 0.0}, r"p_hard is 0\.0"),
        ({"target_easy": 2.0}, r"target_easy is 2\.0"),
        ({"min_keep": 0.0}, r"min_keep is 0\.0"),
        ({"refill_margin": 0.5}, r"refill_margin=0\.5"),
    ):
        with pytest.raises(UserError, match=message):
            Greso(**arguments)
