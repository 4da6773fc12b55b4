"""Several training sources as one pool: ids, order, shares of the prompts chosen, splits and states."""

from __future__ import annotations

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.mixture import Mixture, Rule, floors_of, named
from datamodules.pool import PromptPool
from datamodules.prompts.splits import hold_out, split_pool
from datamodules.selectors import Composed, Dps, Greso, Mopps, Pools, SelectionContext, Selector, Uniform
from datamodules.types import Prompt


def pool_of(name: str, size: int) -> PromptPool:
    prompts = [Prompt(str(i), i, f"{name} question {i}", f"{name} {i}", (i,), {}) for i in range(size)]
    return named(PromptPool.of(prompts), name, [f"reward of {name}"])


def mixture(rule: Rule = "keep", **weights: float | None) -> Mixture:
    parts = {"a": pool_of("a", 60), "b": pool_of("b", 20), "c": pool_of("c", 10)}
    return Mixture(parts, floors_of(rule, {name: weights.get(name) for name in parts}, parts))


def chosen(selector: Selector, pool: Mixture, n: int) -> list[int]:
    """Return how many of `n` prompts each source gets in the next choice."""
    ids = selector.choose(n)
    assert len(set(ids)) == n
    return [sum(one.startswith(f"{name}/") for one in ids) for name in pool.parts]


def ready(selector: Selector, pool: Mixture) -> Selector:
    selector.setup(pool, SelectionContext(seed=3))
    return selector


def test_a_prompt_tells_its_source_rewards_and_place() -> None:
    pool = mixture()
    assert [len(pool), *pool.ids[58:62]] == [90, "a/58", "a/59", "b/0", "b/1"]
    found = pool[61]
    assert (found.id, found.index, found.dataset, found.rewards) == ("b/1", 61, "b", ("reward of b",))
    assert [pool.questions[61], pool.questions[-1], len(pool.questions)] == ["b question 1", "c question 9", 90]
    assert list(pool.questions) == [prompt.question for prompt in pool]
    assert [prompt.index for prompt in pool] == list(range(90))


SELECTORS = [Uniform(), Composed(Uniform(), cool_down=1, explore=0.3), Greso(), Mopps(), Dps(), Pools()]


@pytest.mark.parametrize("selector", SELECTORS)
def test_shares_are_kept_to_within_a_prompt_by_any_selector(selector: Selector) -> None:
    pool = mixture(a=1, b=1, c=2)  # 1.75, 1.75 and 3.5 of 7
    ready(selector, pool)
    total = np.zeros(3)
    for step in range(1, 9):
        total += chosen(selector, pool, 7)
        assert np.abs(total - step * np.array([1.75, 1.75, 3.5])).max() <= 1
    assert total.tolist() == [14, 14, 28]


def test_without_weights_a_source_has_its_share_of_all_prompts() -> None:
    pool = mixture()
    assert chosen(ready(Uniform(), pool), pool, 9) == [6, 2, 1]


class Preferring(Uniform):
    """Ranks the source `a` first, then the others in order."""

    def priorities(self, n: int, rng: np.random.Generator) -> np.ndarray:
        return -np.arange(len(self.pool), dtype=np.float64)


def test_a_floor_leaves_the_rest_to_the_selector_and_free_leaves_all() -> None:
    pool = mixture("floor", b=0.25, c=0.125)
    selector = ready(Preferring(), pool)
    assert [chosen(selector, pool, 8) for _ in range(3)] == [[5, 2, 1]] * 3
    free = mixture("free", b=1)
    assert chosen(ready(Preferring(), free), free, 8) == [8, 0, 0]
    # By priority the floor is met by the best of each source: the selector loses as little as it can.
    selector = ready(Preferring(), pool)
    assert set(selector.choose(8)) == {"a/0", "a/1", "a/2", "a/3", "a/4", "b/0", "b/1", "c/0"}


def test_a_floor_below_what_the_selector_chooses_anyway_changes_nothing() -> None:
    pool = mixture("floor", a=0.5)
    assert set(ready(Preferring(), pool).choose(8)) == {f"a/{i}" for i in range(8)}


def test_a_refill_keeps_the_shares_and_takes_others_when_a_source_is_used_up() -> None:
    pool = mixture(a=1, b=0, c=1)
    selector = ready(Uniform(), pool)
    assert chosen(selector, pool, 16) == [8, 0, 8]
    more = selector.choose(16, refill=True)
    assert sum(one.startswith("c/") for one in more) == 2
    assert chosen(selector, pool, 16)[2] in (8, 9)


def test_a_pass_covers_every_source_and_passes_of_sources_are_independent() -> None:
    pool = mixture(a=3, b=1, c=4)
    selector = ready(Uniform(), pool)
    seen = [one for _ in range(20) for one in selector.choose(8)]
    counts = {name: [seen.count(one) for one in pool.ids if one.startswith(name)] for name in pool.parts}
    assert (min(counts["a"]), max(counts["a"])) == (1, 1)  # 60 of 60
    assert (min(counts["b"]), max(counts["b"])) == (1, 1)  # 20 of 20
    assert (min(counts["c"]), max(counts["c"])) == (8, 8)  # 80 of 10


def test_a_restored_selector_makes_the_same_choices() -> None:
    pool = mixture(a=1, b=1, c=1)
    selector = ready(Uniform(), pool)
    for _ in range(2):
        selector.choose(7)
    state = selector.state_dict()
    expected = [selector.choose(7) for _ in range(3)]
    other = ready(Uniform(), mixture(a=1, b=1, c=1))
    other.load_state_dict(state)
    assert [other.choose(7) for _ in range(3)] == expected


def test_splits_go_by_source_and_the_pools_know_what_another_source_says() -> None:
    pool = mixture()
    train, val = split_pool(pool, 30, seed=1)
    assert isinstance(train, Mixture)
    assert isinstance(val, Mixture)
    assert sorted([*train.ids, *val.ids]) == sorted(pool.ids)
    assert [train[i].id for i in range(len(train))] == list(train.ids)
    held = hold_out(pool, pool_of("b", 5), pool_of("c", 2))
    assert [len(part) for part in held.parts.values()] == [60, 15, 8]  # type: ignore[attr-defined]
    assert pool.content(in_order=True) != held.content(in_order=True)


@pytest.mark.parametrize(
    ("rule", "weights", "said"),
    [
        ("keep", {"a": 1}, "data.train.b has no weight, but a has one"),
        ("keep", {"a": 0, "b": 0, "c": 0}, "are all 0"),
        ("floor", {"a": 3, "b": 1}, "the weights of data.train sum to 4"),
        ("floor", {}, "the weights of data.train are not set"),
    ],
)
def test_weights_that_say_nothing_are_refused(rule: Rule, weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        mixture(rule, **weights)
