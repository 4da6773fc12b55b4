"""DPS against an enumeration of all hidden paths, without recursion over beliefs."""

import math
from itertools import product

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.selectors import Composed, Dps
from tests.support.selector_builders import chosen, outcomes, ready

STATES = range(3)


def state_of(rate):
    return 0 if rate == 0 else 2 if rate == 1 else 1


def path_probabilities(transitions, seen):
    """Yield P(path, seen) of every path s_0 .. s_T: uniform start, transitions[t][to][from], certain emissions."""
    for path in product(STATES, repeat=len(transitions) + 1):
        if all(path[step] == state for step, state in seen.items()):
            yield path, math.prod([1 / 3] + [transitions[t][path[t + 1]][path[t]] for t in range(len(transitions))])


def filtered(transitions, seen, of):
    """Return P(of(path) = key | seen) for every key."""
    weights: dict[object, float] = {}
    for path, weight in path_probabilities(transitions, seen):
        weights[of(path)] = weights.get(of(path), 0.0) + weight
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def brute_force(history, decay, prior):
    """Return the belief before the rollouts of every step; `history[t]` is the measured rate or None."""
    counts = [[prior] * 3 for _ in STATES]
    transitions, seen, beliefs = [], {}, []
    for step, rate in enumerate(history, start=1):
        transitions.append([[counts[j][i] / sum(counts[k][i] for k in STATES) for i in STATES] for j in STATES])
        belief = filtered(transitions, seen, lambda path: path[-1])
        beliefs.append([belief.get(state, 0.0) for state in STATES])
        pairs = {}
        if rate is not None:
            seen[step] = state_of(rate)
            pairs = filtered(transitions, seen, lambda path: (path[-1], path[-2]))
        counts = [[decay * counts[j][i] + (1 - decay) * prior + pairs.get((j, i), 0.0) for i in STATES] for j in STATES]
    return np.array(beliefs)


@pytest.mark.parametrize(("decay", "prior"), [(0.9, 1.0), (0.7, 1.0), (1.0, 0.3), (0.0, 2.0)])
def test_beliefs_equal_the_sum_over_all_hidden_paths(decay, prior):
    size, steps = 12, 7
    rng = np.random.default_rng(0)
    rates = rng.choice([0.0, 0.25, 0.625, 1.0], size=(size, steps))
    measured = rng.random((size, steps)) < np.linspace(0, 1, size)[:, None]
    dps = ready(Dps(decay, prior), size)
    found = []
    for step in range(steps):
        dps.choose(2)
        metrics = dps.metrics()
        found.append([dps.priorities(2, rng), metrics, dps.forecast()])
        now = np.flatnonzero(measured[:, step])
        dps.observe(outcomes(now, rates[now, step], step=step))
    histories = [[rates[q, t] if measured[q, t] else None for t in range(steps)] for q in range(size)]
    expected = np.array([brute_force(history, decay, prior) for history in histories])
    for step, (partly, metrics, forecast) in enumerate(found):
        np.testing.assert_allclose(partly, expected[:, step, 1], rtol=1e-10, atol=1e-14)
        for state, name in enumerate(("wrong", "partly", "right")):
            assert metrics[f"selection/belief_{name}"] == pytest.approx(expected[:, step, state].mean())
        past = [rate for history in histories for rate in history[:step] if rate not in (None, 0.0, 1.0)]
        mean = np.mean(past) if past else 0.5
        np.testing.assert_allclose(forecast, expected[:, step, 2] + mean * expected[:, step, 1], atol=1e-12)


def test_it_takes_the_most_probably_partly_right():
    dps = ready(Dps(), 9)
    dps.choose(3)
    dps.observe(outcomes([0, 1, 2, 3], [0.5, 0.0, 1.0, 0.125]))
    assert set(chosen(dps, 2)) == {0, 3}  # seen partly right: above 1/3; never seen: 1/3; the others below
    assert set(chosen(dps, 2, refill=True)) <= {4, 5, 6, 7, 8}
    # By hand: after 0.5 from a uniform start, counts to "partly" are 1 + 1/3 each: P(partly | partly) = (4/3) / (10/3).
    again = ready(Dps(decay=1.0), 2)
    again.choose(1)
    again.observe(outcomes([0], [0.5]))
    again.choose(1)
    assert again.priorities(1, np.random.default_rng(0)) == pytest.approx([0.4, 1 / 3])


def test_never_seen_prompts_are_drawn_at_random():
    dps = ready(Dps(), 20)
    counts = np.bincount(np.concatenate([chosen(dps, 5) for _ in range(800)]), minlength=20)
    assert abs(counts - 200).max() < 5 * math.sqrt(800 * 0.25 * 0.75)


def test_refills_and_references_within_a_step_are_one_transition():
    once, twice = ready(Dps(), 4), ready(Dps(), 4)
    for step in range(3):
        for dps in (once, twice):
            dps.choose(1)
            dps.choose(1, refill=True)
            dps.observe(outcomes([0], [0.5], step=step))
        twice.observe(outcomes([0], [0.25], "reference", step=step))
        np.testing.assert_array_equal(once.priorities(1, np.random.default_rng(0)), twice.priorities(1, None))
    twice.observe(outcomes([0], [1.0], "reference"))
    assert twice.forecast()[0] == 1.0
    composed = ready(Composed(Dps()), 4)
    for step in range(3):
        composed.choose(1)
        composed.choose(1, refill=True)
        composed.observe(outcomes([0], [0.5], step=step))
    np.testing.assert_array_equal(composed.forecast(), once.forecast())


def test_wrong_arguments_are_one_line_errors():
    with pytest.raises(UserError, match=r"decay is 1\.1"):
        Dps(decay=1.1)
    with pytest.raises(UserError, match=r"prior is 0\.0"):
        Dps(prior=0.0)
