"""The posterior model against brute force: grids for one prompt, a dense Gaussian process, synthetic worlds."""

import numpy as np
import pytest

from datamodules.posterior.acquisition import Acquisition
from datamodules.posterior.evidence import REPLAYED, Log, fit_constants, replay, sample_histories
from datamodules.posterior.model import INTERCEPT_VARIANCE, Beliefs, Constants, Drift, History, PosteriorModel, Shared
from datamodules.posterior.observation import Sites, assimilate, measure
from datamodules.posterior.table import BeliefTable, Cells

NO_FEATURES = np.zeros((1, 0), dtype=np.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def normal(x, mean, variance):
    return np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


def binomial_likelihood(x, k, n):
    return sigmoid(x) ** k * sigmoid(-x) ** (n - k)


@pytest.mark.parametrize("mean", [-6.0, -1.0, 0.3, 5.0])
@pytest.mark.parametrize("variance", [0.01, 1.0, 12.0])
def test_assimilate_is_the_integral(mean, variance):
    x = np.linspace(mean - 12 * np.sqrt(variance), mean + 12 * np.sqrt(variance), 200_001)
    step = x[1] - x[0]
    for k, n in ((0, 8), (3, 8), (8, 8), (0.5, 4), (round(64 * sigmoid(mean)), 64)):
        weight = normal(x, mean, variance) * binomial_likelihood(x, k, n) * step
        first = (weight @ x) / weight.sum()
        second = (weight @ (x - first) ** 2) / weight.sum()
        found = assimilate(np.array([mean]), np.array([variance]), np.array([float(k)]), np.array([float(n)]))
        assert found.mean[0] == pytest.approx(first, abs=2e-5)
        assert found.variance[0] == pytest.approx(second, rel=2e-4)
        assert found.log_evidence[0] == pytest.approx(np.log(weight.sum()), abs=2e-5)


def test_a_site_moves_the_belief_as_the_group_does():
    mean, variance, noise = np.array([0.5, -2.0, 1.0]), np.array([4.0, 9.0, 0.2]), 0.3
    site = measure(mean, variance, noise, np.array([8.0, 0.0, 4.0]), np.full(3, 8.0))
    gain = variance / (variance + site.variance)
    x = np.linspace(-25, 20, 1201)
    for i, k in enumerate((8, 0, 4)):
        shifted = np.array([normal(x, x0, noise) @ binomial_likelihood(x, k, 8) for x0 in x]) * (x[1] - x[0])
        weight = normal(x, mean[i], variance[i]) * shifted
        exact = (weight @ x) / weight.sum()
        exact_variance = (weight @ (x - exact) ** 2) / weight.sum()
        assert mean[i] + gain[i] * (site.value[i] - mean[i]) == pytest.approx(exact, abs=1e-3)
        assert variance[i] * (1 - gain[i]) == pytest.approx(exact_variance, rel=2e-3)


def exact_filter(groups, constants, last_step):
    """Mean success rate, mean and variance of z and the log-evidence, on a grid over (g, z), without drift."""
    g, z = np.linspace(-9, 9, 91), np.linspace(-16, 16, 257)
    joint = normal(g, 0, INTERCEPT_VARIANCE)[:, None] * normal(z[None], g[:, None], constants.own)
    joint /= joint.sum()
    log_evidence, before = 0.0, groups[0][0]

    def moved(joint, gap):
        if gap == 0:
            return joint
        kept = np.exp(-gap / constants.memory)
        out = np.empty_like(joint)
        for row, level in enumerate(g):
            centre = level + kept * (z - level)
            transition = normal(z[:, None], centre[None], (1 - kept**2) * constants.own)
            out[row] = transition @ joint[row]
        return out / out.sum()

    for step, k, n in groups:
        joint = moved(joint, step - before) * binomial_likelihood(z, k, n)
        log_evidence += np.log(joint.sum())
        joint, before = joint / joint.sum(), step
    joint = moved(joint, last_step - before)
    weight = joint.sum(axis=0)
    mean = weight @ z
    return weight @ sigmoid(z), mean, weight @ (z - mean) ** 2, log_evidence


@pytest.mark.parametrize(
    "groups",
    [
        [(1, 0, 8)],
        [(1, 8, 8), (2, 8, 8), (9, 7, 8)],
        [(1, 4, 8), (3, 5, 8), (4, 2, 8), (20, 7, 8), (21, 8, 8)],
        [(1, 0, 8), (6, 0, 8), (12, 0, 8), (30, 1, 8)],
    ],
)
def test_one_prompt_against_a_grid(groups):
    constants = Constants(own=4.0, memory=25.0, noise=1e-4, drift=0.0)
    model, evidence = PosteriorModel(NO_FEATURES, constants), 0.0
    for step, k, n in groups:
        model.advance(step - model.step)
        evidence += model.observe(np.array([0]), np.array([float(k)]), np.array([float(n)]))
    last = groups[-1][0] + 5
    model.advance(5)
    belief = model.beliefs()
    rate, mean, variance, log_evidence = exact_filter(groups, constants, last)
    assert belief.mean[0] == pytest.approx(mean, abs=0.1)
    assert belief.variance[0] == pytest.approx(variance, rel=0.1)
    assert Cells.of(belief).read(BeliefTable(8, 0.0).rate)[0] == pytest.approx(rate, abs=0.01)
    assert evidence == pytest.approx(log_evidence, abs=0.05)


def test_shared_and_own_parts_are_the_dense_gaussian_process():
    rng = np.random.default_rng(0)
    size, width, last = 12, 4, 40
    features = rng.normal(size=(size, width)).astype(np.float32) / 2
    constants = Constants(own=3.0, shared=2.5, memory=15.0)
    history, shared = History(size, constants), Shared(features, constants.shared)
    seen = []
    for step in (1, 2, 3, 9, 9, 17, 30, 36):
        positions = rng.choice(size - 2, 4, replace=False)  # two prompts are never tried
        measured, variance = rng.normal(size=4) * 2, rng.uniform(0.05, 2, 4)
        shared.update(positions, history.update(step, positions, measured, variance))
        seen += list(zip(positions, [step] * 4, measured, variance, strict=True))
    who, when, value, error = (np.array(column) for column in zip(*seen, strict=True))
    design = np.concatenate([features, np.ones((size, 1))], axis=1).astype(np.float64)
    kernel = design @ np.diag([constants.shared] * width + [INTERCEPT_VARIANCE]) @ design.T

    def covariance(i, s, j, t):
        own = constants.own * np.exp(-np.abs(s[:, None] - t[None]) / constants.memory)
        return kernel[np.ix_(i, j)] + np.where(i[:, None] == j[None], own, 0.0)

    everyone, now = np.arange(size), np.full(size, last)
    cross = covariance(everyone, now, who, when)
    solved = np.linalg.solve(covariance(who, when, who, when) + np.diag(error), np.stack([value, *cross]).T)
    conditional = history.now(last)
    mean, variance = shared.all_moments()
    np.testing.assert_allclose(conditional.level + conditional.pull * mean, cross @ solved[:, 0], atol=1e-5)
    exact = np.diag(covariance(everyone, now, everyone, now) - cross @ solved[:, 1:])
    np.testing.assert_allclose(conditional.spread + conditional.pull**2 * variance, exact, rtol=1e-5)
    np.testing.assert_allclose(shared.moments(everyone), (mean, variance), atol=1e-5)


def test_drift_by_hand():
    drift = Drift(0.5, 0.25)
    drift.update(Sites(np.array([2.0, -1.0]), np.array([1.0, 0.5]), np.zeros(2)), np.array([0.5, 0.0]), np.ones(2))
    # Precisions 1/0.25, 1/2 and 1/1.5 on the values 0.5, 1.5 and -1.
    assert drift.mean == pytest.approx((0.5 * 4 + 1.5 / 2 - 1 / 1.5) / (4 + 1 / 2 + 1 / 1.5))
    assert drift.variance == pytest.approx(1 / (4 + 1 / 2 + 1 / 1.5))


def world(constants, steps, batch, size=800, width=3, slope=0.0, seed=0):
    """Return features, outcomes of random prompts in a world that follows the model, last log-odds and drift."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(size, width)).astype(np.float32) / np.sqrt(width, dtype=np.float32)
    level = features @ rng.normal(size=width) * np.sqrt(constants.shared) - 0.5
    course, drift, log = level + rng.normal(size=size) * np.sqrt(constants.own), 0.0, Log.empty()
    kept = np.exp(-1 / constants.memory)
    for step in range(1, steps + 1):
        if step > 1:
            own = rng.normal(size=size) * np.sqrt((1 - kept**2) * constants.own)
            course = level + kept * (course - level) + own
            drift += slope + rng.normal() * np.sqrt(constants.drift)
        positions = rng.choice(size, batch, replace=False)
        noise = rng.normal(size=batch) * np.sqrt(constants.noise)
        successes = rng.binomial(8, sigmoid(drift + course[positions] + noise)).astype(float)
        log = log.extended(step, positions, successes, np.full(batch, 8.0))
    return features, log, drift + course, drift


def test_coverage_in_a_world_that_it_models():
    constants = Constants(own=3.0, shared=2.0, memory=40.0, noise=0.05, drift=2e-3)
    scores = []
    for seed in range(4):
        features, log, truth, _ = world(constants, steps=30, batch=100, seed=seed)
        belief = replay(features, constants, list(log.batches()))[0].beliefs()
        scores.append((truth - belief.mean) / np.sqrt(belief.variance))
    score = np.abs(np.concatenate(scores))
    for quantile, share in ((0.6745, 0.5), (1.2816, 0.8), (1.9600, 0.95)):
        assert np.mean(score < quantile) == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("slope", [0.05, -0.05, 0.0])
def test_drift_is_recovered(slope):
    """A steady trend is followed with a lag; the part absorbed by the pool's level is not lost to the beliefs."""
    features, log, truth, drift = world(
        Constants(own=2.0, shared=1.0, memory=500.0, noise=1e-3, drift=1e-3), steps=40, batch=100, slope=slope
    )
    filtered = Constants(own=2.0, shared=1.0, memory=500.0, noise=1e-3, drift=1e-2)
    model = replay(features, filtered, list(log.batches()))[0]
    assert model.drift.mean == pytest.approx(drift, abs=0.35)
    error = model.beliefs().mean - truth
    assert np.mean(error) == pytest.approx(0, abs=0.1)
    assert np.mean(error[model.history.last < 20]) == pytest.approx(0, abs=0.15)


def test_constants_are_learnt():
    truth = Constants(own=8.0, shared=6.0, memory=30.0, noise=0.03, drift=1e-3)
    features, log, _, _ = world(truth, steps=25, batch=80, size=250, width=16)
    constants = Constants()
    for _ in range(3):
        constants = fit_constants(features, constants, log)
    for name, factor in (("own", 1.6), ("shared", 4.0), ("memory", 1.8)):
        assert 1 / factor < getattr(constants, name) / getattr(truth, name) < factor, name
    batches = list(log.batches())
    found, true = replay(features, constants, batches)[1], replay(features, truth, batches)[1]
    assert found > replay(features, Constants(), batches)[1] + 20
    assert found > true - 5


def test_log_keeps_whole_histories_and_distinct_batches():
    log = Log.empty()
    rng = np.random.default_rng(0)
    for step in range(60):
        log = log.extended(step, rng.choice(900, 100, replace=False), np.ones(100), np.full(100, 8.0))
    kept = sample_histories(log)
    assert REPLAYED - 60 <= len(kept) <= REPLAYED
    chosen = np.unique(kept.positions)
    assert len(kept) == np.isin(log.positions, chosen).sum()
    twice = Log.empty().extended(1, np.array([3, 5]), np.ones(2), np.ones(2))
    twice = twice.extended(1, np.array([5, 6]), np.ones(2), np.ones(2))
    assert [batch.positions.tolist() for batch in twice.batches()] == [[3, 5], [5, 6]]
    thrice = twice.extended(2, np.array([7]), np.ones(1), np.ones(1))
    assert [batch.positions.tolist() for batch in thrice.batches()] == [[3, 5], [5, 6], [7]]


def quantities(mean, deviation, noise, samples, threshold):
    """Return all tabulated quantities by summing over grids and counts."""
    x = np.linspace(mean - 9 * deviation - 1, mean + 9 * deviation + 1, 3001)
    shifts, shift_weight = np.polynomial.hermite_e.hermegauss(21)
    prior = normal(x, mean, deviation**2)
    prior /= prior.sum()

    def chance(k):
        ways = np.prod([(samples - j) / (j + 1) for j in range(k)])
        p = sum(
            w * binomial_likelihood(x + np.sqrt(noise) * s, k, samples)
            for s, w in zip(shifts, shift_weight, strict=True)
        )
        return ways * p / shift_weight.sum()

    table = np.array([chance(k) for k in range(samples + 1)])
    inner = 1 - table[0] - table[-1]
    rate = prior @ sigmoid(x)
    variance = prior @ (sigmoid(x) - rate) ** 2
    total = table @ prior
    after = table * prior / total[:, None]
    removed = variance - total @ np.array([w @ (sigmoid(x) - w @ sigmoid(x)) ** 2 for w in after])
    improvement = total @ np.maximum(after @ inner, threshold) - max(prior @ inner, threshold)
    return rate, np.sqrt(variance), prior @ inner, removed, improvement


@pytest.mark.parametrize(("mean", "deviation"), [(0.1, 0.3), (-1.3, 1.7), (-3.1, 3.3), (2.2, 0.9)])
def test_table_is_the_brute_force(mean, deviation):
    noise, samples, threshold = 0.05, 8, 0.9
    table, cells = BeliefTable(samples, noise), Cells.of(Beliefs(np.array([mean]), np.array([deviation**2])))
    rate, spread, informative, removed, improvement = quantities(mean, deviation, noise, samples, threshold)
    assert cells.read(table.rate)[0] == pytest.approx(rate, abs=2e-3)
    assert cells.read(table.rate_deviation)[0] == pytest.approx(spread, abs=2e-3)
    assert cells.read(table.informative)[0] == pytest.approx(informative, abs=6e-3)
    # Table and model keep two moments of the belief after a group, so these two agree less closely.
    assert cells.read(table.removed)[0] == pytest.approx(removed, abs=5e-3)
    assert cells.read(table.improvement(threshold))[0] == pytest.approx(improvement, abs=1.2e-2)
    assert np.all(table.improvement(0.0) == 0)
    assert np.all(table.improvement(1.0) == 0)


def test_priorities_are_the_three_terms():
    table = BeliefTable(8, 0.02)
    cells = Cells.of(Beliefs(np.array([0.0, -3.0, 1.0, -0.5]), np.array([0.1, 0.2, 8.0, 9.0])))
    informative = cells.read(table.informative)
    second = np.sort(informative)[-2]
    found = Acquisition(forecast_value=0.3).priorities(table, cells, 0.1, memory=150.0, n=2, step=5)
    greedy = informative + cells.read(table.improvement(second))
    # Knowledge lasts 1 / (1/300 + 1/150) = 100 steps.
    expected = greedy + 0.3 * 100 / 5 * 2 / 4 / 0.1 * cells.read(table.removed)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    plain = Acquisition(0.0).priorities(table, cells, 0.1, memory=12.0, n=2, step=5)
    np.testing.assert_array_equal(plain, greedy)


def test_steps_without_outcomes_pass_too():
    """The courses forget and the drift widens by the whole gap between two batches, replayed or not."""
    constants, features = Constants(memory=5.0, drift=0.1), np.zeros((3, 0), dtype=np.float32)
    log = Log.empty().extended(1, np.array([0]), np.array([6.0]), np.array([8.0]))
    log = log.extended(4, np.array([1]), np.array([2.0]), np.array([8.0]))
    replayed = replay(features, constants, list(log.batches()))[0]
    model = PosteriorModel(features, constants)
    model.advance()
    model.observe(np.array([0]), np.array([6.0]), np.array([8.0]))
    variance, far = model.drift.variance, model.beliefs().mean[0]
    for _ in range(3):
        model.advance()
    assert model.step == 4
    assert model.drift.variance == pytest.approx(variance + 3 * 0.1)
    assert abs(model.beliefs().mean[0]) < abs(far)  # forgotten in part
    model.observe(np.array([1]), np.array([2.0]), np.array([8.0]))
    assert replayed.step == model.step
    np.testing.assert_allclose(replayed.beliefs().mean, model.beliefs().mean)
    np.testing.assert_allclose(replayed.beliefs().variance, model.beliefs().variance)
