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


def path_probabilities(transitions, seen, start):
    """Yield P(path, seen) of every path s_0 .. s_T: P(s_0) = start, transitions[t][to][from], certain emissions."""
    for path in product(STATES, repeat=len(transitions) + 1):
        if all(path[step] == state for step, state in seen.items()):
            steps = [transitions[t][path[t + 1]][path[t]] for t in range(len(transitions))]
            yield path, math.prod([start[path[0]], *steps])


def filtered(transitions, seen, of, start):
    """Return P(of(path) = key | seen) for every key."""
    weights: dict[object, float] = {}
    for path, weight in path_probabilities(transitions, seen, start):
        weights[of(path)] = weights.get(of(path), 0.0) + weight
    total = sum(weights.values())
    return {key: weight / total for key, weight in weights.items()}


def brute_force(history, decay, prior, start):
    """Return the belief before the rollouts of every step; `history[t]` is the measured rate or None.

    `prior[to][from]` are the counts of transitions before any.
    """
    counts = prior
    transitions, seen, beliefs = [], {}, []
    for step, rate in enumerate(history, start=1):
        transitions.append([[counts[j][i] / sum(counts[k][i] for k in STATES) for i in STATES] for j in STATES])
        belief = filtered(transitions, seen, lambda path: path[-1], start)
        beliefs.append([belief.get(state, 0.0) for state in STATES])
        pairs = {}
        if rate is not None:
            seen[step] = state_of(rate)
            pairs = filtered(transitions, seen, lambda path: (path[-1], path[-2]), start)
        counts = [
            [decay * counts[j][i] + (1 - decay) * prior[j][i] + pairs.get((j, i), 0.0) for i in STATES] for j in STATES
        ]
    return np.array(beliefs)


def flat(count):
    return [[count] * 3 for _ in STATES]


UNIFORM = (1 / 3, 1 / 3, 1 / 3)


@pytest.mark.parametrize(
    ("options", "counts", "start"),
    [
        ({"decay": 0.9}, flat(1.0), UNIFORM),
        ({"decay": 0.7, "prior": 1.0}, flat(1.0), UNIFORM),
        ({"decay": 1.0, "prior": 0.3}, flat(0.3), UNIFORM),
        ({"decay": 0.0, "prior": 2.0}, flat(2.0), UNIFORM),
        # By name, [to][from]: getting worse, or leaving a state, has half a count.
        ({"prior": "progress"}, [[1, 0.5, 0.5], [1, 1, 0.5], [1, 1, 1]], UNIFORM),
        ({"prior": "stability", "start": "wrong"}, [[1, 0.5, 0.5], [0.5, 1, 0.5], [0.5, 0.5, 1]], (1, 0, 0)),
        ({"prior": 0.5, "start": "partly", "decay": 0.5}, flat(0.5), (0, 1, 0)),
    ],
)
def test_beliefs_equal_the_sum_over_all_hidden_paths(options, counts, start):
    size, steps = 12, 7
    rng = np.random.default_rng(0)
    rates = rng.choice([0.0, 0.25, 0.625, 1.0], size=(size, steps))
    measured = rng.random((size, steps)) < np.linspace(0, 1, size)[:, None]
    dps = ready(Dps(**options), size)
    found = []
    for step in range(steps):
        dps.choose(2)
        metrics = dps.metrics()
        found.append([dps.priorities(2, rng), metrics, dps.forecast()])
        now = np.flatnonzero(measured[:, step])
        dps.observe(outcomes(now, rates[now, step], step=step))
    histories = [[rates[q, t] if measured[q, t] else None for t in range(steps)] for q in range(size)]
    decay = options.get("decay", 0.9)
    expected = np.array([brute_force(history, decay, counts, start) for history in histories])
    for step, (partly, metrics, forecast) in enumerate(found):
        np.testing.assert_allclose(partly, expected[:, step, 1], rtol=1e-10, atol=1e-14)
        for state, name in enumerate(("wrong", "partly", "right")):
            assert metrics[f"selection/belief_{name}"] == pytest.approx(expected[:, step, state].mean())
        past = [rate for history in histories for rate in history[:step] if rate not in (None, 0.0, 1.0)]
        mean = np.mean(past) if past else 0.5
        np.testing.assert_allclose(forecast, expected[:, step, 2] + mean * expected[:, step, 1], atol=1e-12)


def test_the_local_prior_by_hand():
    """From all wrong to all right it has no count, until that is what was measured."""
    dps = ready(Dps(decay=1.0, prior="local", start="wrong"), 3)
    dps.choose(1)  # one transition from wrong: 1/2 wrong, 1/2 partly right
    np.testing.assert_allclose(dps.priorities(1, None), [0.5, 0.5, 0.5])
    assert dps.metrics()["selection/belief_right"] == 0.0
    dps.observe(outcomes([0, 1], [1.0, 0.5]))
    dps.choose(1)
    # Prompt 0 is right: counts from right are (0, 1, 1), partly 1/2. Prompt 1: from partly (1, 1, 1), partly 1/3.
    # Prompt 2: half of each, 1/2 * 1/2 + 1/2 * 1/3.
    np.testing.assert_allclose(dps.priorities(1, None), [1 / 2, 1 / 3, 5 / 12])
    # The impossible transition of prompt 0 is a count: from wrong now (1, 1, 1).
    np.testing.assert_allclose(dps._counts[:, 0, 0], [1, 1, 1])
    dps.observe(outcomes([0], [0.0], step=1))
    dps.choose(1)
    np.testing.assert_allclose(dps.priorities(1, None)[0], 1 / 3)
    assert np.isfinite(dps.forecast()).all()


def test_the_entropy_of_a_belief_is_added():
    dps, plain = ready(Dps(decay=1.0, entropy_weight=0.5), 2), ready(Dps(decay=1.0), 2)
    for one in (dps, plain):
        one.choose(1)
        one.observe(outcomes([0], [0.5]))
        one.choose(1)
    # Beliefs (0.3, 0.4, 0.3) and three thirds.
    entropy = -(0.6 * math.log(0.3) + 0.4 * math.log(0.4))
    assert dps.priorities(1, None) == pytest.approx([0.4 + 0.5 * entropy, 1 / 3 + 0.5 * math.log(3)])
    assert plain.priorities(1, None) == pytest.approx([0.4, 1 / 3])


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
    with pytest.raises(UserError, match="did you mean 'progress'"):
        Dps(prior="progres")
    with pytest.raises(UserError, match="did you mean 'wrong'"):
        Dps(start="wron")
    with pytest.raises(UserError, match=r"entropy_weight is -0\.1"):
        Dps(entropy_weight=-0.1)
