"""Duties of every online selector: continue after a restore, never repeat in a step, stay fast on large pools."""

import time
import tracemalloc

import numpy as np
import pytest

from datamodules.pool import PromptPool
from datamodules.selectors import (
    Composed,
    Dots,
    Greso,
    Mopps,
    SelectionContext,
    ZeroVarianceSkip,
)
from tests.support.selector_builders import PLAIN, outcomes, random_embeddings, saved_and_loaded
from tests.support.tables import few

SIZE, MILLION = 60, 1_000_000
SELECTORS = {
    **PLAIN,
    "Composed": lambda: Composed(Mopps(), [ZeroVarianceSkip()], cool_down=2, explore=0.3),
    "Greso around Dots": lambda: Greso(ranker=Dots(), cool_down=1, explore=0.1),
}


@pytest.fixture(params=SELECTORS)
def make(request, monkeypatch, tmp_path):
    random_embeddings(monkeypatch, SIZE, 6)

    def made():
        selector = SELECTORS[request.param]()
        questions = [f"question {i}" for i in range(SIZE)]
        pool = PromptPool([].__getitem__, [f"p{i}" for i in range(SIZE)], questions)
        selector.setup(pool, SelectionContext(seed=3, policy_path="policy", cache_dir=tmp_path))
        return selector

    return made


def lived(selector, steps):
    """Run steps as in training, with outcomes that depend on the chosen ids; return everything observable."""
    seen = []
    for step in steps:
        first = selector.choose(9)
        before = selector.forecast()
        learn(selector, first, step, "fresh")
        refill = selector.choose(4, exclude=["p0"], refill=True)
        learn(selector, refill, step, "fresh")
        references = selector.choose_references(12)
        if step % 2 == 0:
            learn(selector, references, step, "reference")
        after = selector.forecast()
        forecasts = [None if each is None else each.tolist() for each in (before, after)]
        seen.append([first, refill, references, selector.metrics(), sorted(selector.explored_ids), forecasts])
    return seen


def learn(selector, ids, step, source):
    positions = [int(name[1:]) for name in ids]
    ability = np.linspace(-0.3, 1.3, SIZE)[positions].clip(0, 1)
    rng = np.random.default_rng([step, len(ids), *positions])
    selector.observe(outcomes(positions, rng.binomial(8, ability) / 8, source, step))


@pytest.mark.parametrize("pause", [1, 4, 11])
def test_a_restored_selector_continues_with_identical_choices(make, pause):
    straight, stopped = make(), make()
    expected = lived(straight, range(20))
    assert lived(stopped, range(pause)) == expected[:pause]
    resumed = make()
    resumed.load_state_dict(saved_and_loaded(stopped.state_dict()))
    assert lived(resumed, range(pause, 20)) == expected[pause:]


def test_the_state_is_a_copy(make):
    selector = make()
    lived(selector, range(3))
    state = selector.state_dict()
    expected = lived(selector, range(3, 6))
    other = make()
    other.load_state_dict(state)
    assert lived(other, range(3, 6)) == expected
    other = make()
    other.load_state_dict(state)
    assert lived(other, range(3, 6)) == expected


def test_no_step_holds_a_prompt_twice(make):
    for first, refill, *_ in lived(make(), range(12)):
        assert len({*first, *refill}) == 13
        assert "p0" not in refill


def test_another_seed_chooses_otherwise(make, tmp_path):
    one, other = make(), make()
    other.setup(other.pool, SelectionContext(seed=4, policy_path="policy", cache_dir=tmp_path))
    assert [one.choose(9) for _ in range(3)] != [other.choose(9) for _ in range(3)]


@pytest.fixture(scope="module")
def million():
    names = [f"p{i}" for i in range(MILLION)]
    pool = PromptPool([].__getitem__, names, names)
    pool.positions(names[:1])  # the index of ids belongs to the pool
    return pool


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize("name", few(SELECTORS, 4))
def test_a_million_prompts(million, name, monkeypatch, tmp_path):
    """Choosing 512 of 1,000,000 prompts with forecasts takes at most as long as 150 sorts of a million, and 2 GB.

    That is about 4 s of a core; a Python loop over the pool takes ten times as long. The sort next to each choice tells
    a slow core from a slow selector.
    """
    random_embeddings(monkeypatch, MILLION if "Dots" in name else 1, 64)
    rng = np.random.default_rng(0)
    tracemalloc.start()
    selector = SELECTORS[name]()
    selector.setup(million, SelectionContext(seed=0, policy_path="policy", cache_dir=tmp_path))
    everywhere, unsorted = np.arange(0, MILLION, 3), rng.random(MILLION)
    selector.observe(outcomes(everywhere, rng.binomial(8, rng.random(len(everywhere))) / 8))
    ids, sorts = selector.choose(512), []
    for step in range(4):
        selector.observe(outcomes([int(each[1:]) for each in ids], rng.binomial(8, 0.5, 512) / 8, step=step))
        references = [int(each[1:]) for each in selector.choose_references(256)]
        selector.observe(outcomes(references, rng.binomial(8, 0.5, 256) / 8, "reference", step))
        start = time.perf_counter()
        np.sort(unsorted)
        middle = time.perf_counter()
        ids = selector.choose(512)
        selector.forecast()
        sorts.append((time.perf_counter() - middle) / (middle - start))
        assert len(set(ids)) == 512
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{name}: {np.median(sorts):.1f} sorts, peak of NumPy and Python {peak / 1e9:.2f} GB")
    assert np.median(sorts) <= 150
    assert peak <= 2e9
