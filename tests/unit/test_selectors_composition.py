"""Cool-down, filters, exploration and fallback around a ranker, worked by hand on scripted priorities."""

import math

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.selectors import Composed, Dps, Filter, Greso, Mopps, Pools, Ranker, Uniform, ZeroVarianceSkip
from datamodules.selectors.sampling import top_k
from tests.support.selector_builders import chosen, outcomes, ready


class Scripted(Ranker):
    """Ranks the prompts by position; those in `never` are not eligible."""

    def __init__(self, never=()):
        super().__init__()
        self.never = list(never)
        self.settled = []

    def priorities(self, n, rng):
        values = -np.arange(len(self.pool), dtype=float)
        values[self.never] = -np.inf
        return values

    def settle(self, chosen, passed_over=()):
        self.settled.append((chosen.tolist(), list(passed_over)))


class Only(Filter):
    def __init__(self, admitted, size):
        self.mask = np.isin(np.arange(size), list(admitted))

    def admits(self, rng):
        return self.mask


def test_top_k_is_sorted_and_draws_ties_evenly():
    rng = np.random.default_rng(0)
    values = np.array([3.0, 1.0, 2.0, 2.0, 2.0, -np.inf])
    counts = np.zeros(6)
    orders = set()
    for _ in range(3000):
        top = top_k(values, 3, rng)
        assert top[0] == 0
        assert len(set(top.tolist())) == 3
        counts[top] += 1
        orders.add(tuple(top.tolist()))
    assert counts[[1, 5]].tolist() == [0, 0]
    assert abs(counts[2:5] - 2000).max() < 5 * math.sqrt(3000 * 2 / 9)
    assert len(orders) == 6
    assert top_k(values, 6, rng)[-2:].tolist() == [1, 5]
    assert top_k(values, 2, rng, np.array([False, True, False, False, False, True])).tolist() == [1, 5]


@pytest.mark.parametrize("make", [Uniform, Mopps, Dps, Pools])
def test_without_rules_the_choices_are_the_rankers_own(make):
    alone, composed = ready(make(), 50), ready(Composed(make()), 50)
    rng = np.random.default_rng(0)
    for step in range(12):
        first = chosen(alone, 7)
        assert chosen(composed, 7).tolist() == first.tolist()
        refill = chosen(alone, 3, exclude=["p1", "p2"], refill=True)
        assert chosen(composed, 3, exclude=["p1", "p2"], refill=True).tolist() == refill.tolist()
        seen = outcomes([*first, *refill], rng.binomial(8, 0.5, 10) / 8, step=step)
        alone.observe(seen)
        composed.observe(seen)
        assert alone.choose_references(5) == composed.choose_references(5)
        assert composed.metrics().items() >= alone.metrics().items()
    if alone.forecast() is not None:
        np.testing.assert_array_equal(alone.forecast(), composed.forecast())


def test_a_chosen_prompt_rests_for_exactly_the_cool_down():
    resting = ready(Composed(Scripted(), cool_down=2), 10)
    assert [chosen(resting, 2).tolist() for _ in range(5)] == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_a_refill_belongs_to_its_step():
    resting = ready(Composed(Scripted(), cool_down=1), 10)
    assert chosen(resting, 2).tolist() == [0, 1]
    assert chosen(resting, 2, refill=True).tolist() == [2, 3]
    assert chosen(resting, 1, exclude=["p4"], refill=True).tolist() == [5]
    assert chosen(resting, 2).tolist() == [4, 6]
    assert chosen(resting, 6).tolist() == [0, 1, 2, 3, 5, 7]


@pytest.mark.parametrize("selector", [Uniform(), Scripted(), Composed(Scripted(), explore=0.5)])
def test_a_step_never_chooses_twice_and_a_refill_may_run_dry(selector):
    ready(selector, 10)
    step = [*chosen(selector, 4), *chosen(selector, 4, exclude=["p9"], refill=True)]
    last = chosen(selector, 4, exclude=["p9"], refill=True)
    assert len(last) in (1, 2)  # two were left, or one if p9 was not chosen yet
    assert len(set(step) | set(last)) == len(step) + len(last)
    assert 9 not in [*step[4:], *last]
    with pytest.raises(UserError, match="prompts_per_step is 11 but only 10 prompts"):
        selector.choose(11)
    with pytest.raises(UserError, match="prompts_per_step is 9 but only 8 prompts"):
        selector.choose(9, exclude=["p1", "p2"])


def test_filters_are_all_respected():
    both = ready(Composed(Scripted(), filters=[Only(range(0, 20, 2), 20), Only(range(6, 20), 20)]), 20)
    assert chosen(both, 4).tolist() == [6, 8, 10, 12]
    assert both.ranker.settled == [([6, 8, 10, 12], [0, 1, 2, 3, 4, 5, 7, 9, 11])]
    assert both.metrics()["selection/fallback_fraction"] == 0


def test_too_few_fall_back_to_the_least_recently_chosen():
    strict = ready(Composed(Scripted(never=[5]), filters=[Only([0, 1, 2], 6)]), 6)
    assert chosen(strict, 2).tolist() == [0, 1]
    first = chosen(strict, 4).tolist()
    assert first[:3] == [0, 1, 2]
    assert first[3] in (3, 4, 5)  # never chosen: before any other
    assert strict.metrics()["selection/fallback_fraction"] == 0.25
    for _ in range(2):
        assert chosen(strict, 4).tolist()[:3] == [0, 1, 2]
    # 3, 4 and 5 were chosen once each; the earliest comes first.
    assert chosen(strict, 4).tolist() == [0, 1, 2, first[3]]
    assert sorted(chosen(strict, 6)) == list(range(6))
    assert strict.metrics()["selection/fallback_fraction"] == 0.5


def test_a_cool_down_longer_than_the_pool_lasts_goes_round():
    tired = ready(Composed(Scripted(), cool_down=50), 7)
    last = np.zeros(7)
    for step in range(1, 12):
        longest_ago = sorted(last)[:3]
        picked = chosen(tired, 3)
        assert sorted(last[picked]) == longest_ago
        last[picked] = step
        fallback = {1: 0.0, 2: 0.0, 3: 2 / 3}.get(step, 1.0)
        assert tired.metrics()["selection/fallback_fraction"] == pytest.approx(fallback)


def test_exploration_is_exact_uniform_and_known():
    size, steps = 40, 3000
    curious = ready(Composed(Scripted(), filters=[Only(range(10), size)], explore=0.3), size)
    drawn, asked, explored = np.zeros(size), 0, 0
    for _ in range(steps):
        picked = set(curious.choose(3))
        asked += 3
        assert curious.explored_ids <= picked
        assert len(picked) == 3
        assert picked - curious.explored_ids <= {"p0", "p1", "p2", "p3"}  # ranked: the best that are left
        explored += len(curious.explored_ids)
        assert explored == math.floor(0.3 * asked + 1e-9)
        assert curious.metrics()["selection/explored_fraction"] == len(curious.explored_ids) / 3
        drawn[[int(name[1:]) for name in curious.explored_ids]] += 1
    expected = explored / size
    assert ((drawn - expected) ** 2 / expected).sum() < 72.1  # 0.1% point at 39 degrees of freedom


def test_exploration_counts_refills_and_leaves_resting_prompts_alone():
    curious = ready(Composed(Scripted(), cool_down=2, explore=0.5), 30)
    history = []
    for _ in range(20):
        step = [*chosen(curious, 4), *chosen(curious, 2, refill=True)]
        assert len(curious.explored_ids) == 3
        assert curious.metrics()["selection/explored_fraction"] == 0.5
        assert not set(step) & {position for earlier in history[-2:] for position in earlier}
        history.append(step)
    everything = ready(Composed(Scripted(), explore=1.0), 6)
    assert sorted(chosen(everything, 6)) == list(range(6))
    assert len(everything.explored_ids) == 6


def test_a_refused_prompt_has_had_its_turn_in_the_pass_and_a_resting_one_has_not():
    size = 12
    refusing = ready(Composed(Uniform(), filters=[Only(range(6), size)]), size)
    turns = [chosen(refusing, 2) for _ in range(6)]
    for start in (0, 3):
        assert sorted(np.concatenate(turns[start : start + 3])) == list(range(6))
    resting = ready(Composed(Uniform(), cool_down=3), size)
    picks = np.concatenate([chosen(resting, 3) for _ in range(40)])
    assert np.bincount(picks, minlength=size).tolist() == [10] * size


def test_checkpoints_of_another_composition_are_refused():
    saved = ready(Composed(Uniform(), filters=[ZeroVarianceSkip()]), 10).state_dict()
    with pytest.raises(UserError, match=r"state of selector Composed, this run has Mopps"):
        ready(Mopps(), 10).load_state_dict(saved)
    with pytest.raises(UserError, match=r"state of selector Uniform, this run has Dps"):
        ready(Composed(Dps(), filters=[ZeroVarianceSkip()]), 10).load_state_dict(saved)
    with pytest.raises(UserError, match=r"filters \['ZeroVarianceSkip'\], this run has \[\]"):
        ready(Composed(Uniform()), 10).load_state_dict(saved)


def test_filters_of_one_class_keep_their_own_states():
    def build():
        filters = [ZeroVarianceSkip(p_easy=0.9), ZeroVarianceSkip(p_easy=0.1), ZeroVarianceSkip(p_hard=0.2)]
        return ready(Composed(Uniform(), filters=filters), 20)

    first, second = build(), build()
    for step in range(4):
        first.observe(outcomes(chosen(first, 6), [0.0, 1.0, 0.5, 1.0, 0.0, 1.0], step=step))
    state = first.state_dict()
    assert list(state["filters"]) == ["ZeroVarianceSkip", "ZeroVarianceSkip.2", "ZeroVarianceSkip.3"]
    second.load_state_dict(state)
    states = [[str(each.state_dict()) for each in one.filters] for one in (first, second)]
    assert states[0] == states[1]
    assert len(set(states[0])) == 3
    assert [chosen(first, 6).tolist() for _ in range(4)] == [chosen(second, 6).tolist() for _ in range(4)]
    with pytest.raises(UserError, match=r"'ZeroVarianceSkip.3'\], this run has \['ZeroVarianceSkip'\]"):
        ready(Composed(Uniform(), filters=[ZeroVarianceSkip()]), 20).load_state_dict(state)


def test_wrong_arguments_are_one_line_errors():
    for arguments, message in (({"cool_down": -1}, "cool_down is -1"), ({"explore": 1.2}, r"explore is 1\.2")):
        with pytest.raises(UserError, match=message):
            Composed(Uniform(), **arguments)
    assert Greso(explore=0.25, cool_down=2).explore == 0.25


def test_metrics_of_filters_of_one_class_are_apart():
    class Counted(Only):
        def metrics(self):
            return {"selection/admitted": float(self.mask.sum())}

    filters = [Counted([0], 4), Only([1], 4), Counted([0, 1], 4), Counted([0, 1, 2], 4)]
    metrics = ready(Composed(Scripted(), filters=filters), 4).metrics()
    admitted = {name: value for name, value in metrics.items() if "admitted" in name}
    assert admitted == {"selection/admitted": 1, "selection/admitted.2": 2, "selection/admitted.3": 3}
