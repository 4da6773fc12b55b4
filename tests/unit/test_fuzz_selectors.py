"""After any sequence of choices, outcomes, saving and loading, a restored selector continues identically."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from datamodules.pool import PromptPool
from datamodules.selectors import (
    Aligned,
    Composed,
    Dots,
    Greso,
    Mopps,
    Posterior,
    SelectionContext,
    Selector,
    ZeroVarianceSkip,
)
from datamodules.types import GroupSketch
from tests.support.fuzzing import examples
from tests.support.selector_builders import PLAIN, outcomes, random_embeddings, saved_and_loaded

SIZE = 24
SELECTORS: dict[str, Any] = {
    **PLAIN,
    "Composed": lambda: Composed(Mopps(), [ZeroVarianceSkip()], cool_down=1, explore=0.3),
    "Greso around Dots": lambda: Greso(ranker=Dots(), cool_down=1, explore=0.1),
    "Posterior": lambda: Posterior(temperature=0.3),
    "Aligned": lambda: Aligned(memory=16),
}
RUNS = {"Posterior": (6, 15), "Aligned": (6, 20)}
"""Number of runs and steps per run where they differ from (12, 20): Posterior refits its constants often."""
POSITIONS = st.lists(st.integers(0, SIZE - 1), unique=True, max_size=10)


@pytest.fixture(autouse=True)
def temporary_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send cached embeddings to a temporary folder."""
    monkeypatch.chdir(tmp_path)


def made(name: str) -> Selector:
    selector: Selector = SELECTORS[name]()
    pool = PromptPool([].__getitem__, [f"p{i}" for i in range(SIZE)], [f"question {i}" for i in range(SIZE)])
    selector.setup(pool, SelectionContext(seed=3, policy_path="policy", cache_dir=Path("embeddings")))
    return selector


class Runs(RuleBasedStateMachine):
    """Two runs of one selector: one never stops, the other is saved and restored at times."""

    name = "Uniform"

    @initialize()
    def begin(self) -> None:
        self.straight, self.stopped = made(self.name), made(self.name)
        self.step = 0
        self.chosen: list[str] = []

    @rule(n=st.integers(1, 8), excluded=POSITIONS)
    def choose(self, n: int, excluded: list[int]) -> None:
        names = [f"p{position}" for position in excluded]
        one, other = (each.choose(n, exclude=names) for each in (self.straight, self.stopped))
        assert one == other
        assert len(set(one)) == n and not set(one) & set(names)
        self.chosen, self.step = one, self.step + 1

    @rule(n=st.integers(1, SIZE))
    def refill(self, n: int) -> None:
        one, other = (each.choose(n, refill=True) for each in (self.straight, self.stopped))
        assert one == other
        assert len(set(one)) == len(one) == min(n, SIZE - len(self.chosen)) and not set(one) & set(self.chosen)
        self.chosen = self.chosen + one

    @rule(positions=POSITIONS, right=st.integers(0, 8), source=st.sampled_from(["fresh", "reference"]))
    def observe(self, positions: list[int], right: int, source: Any) -> None:
        rates = [(right + position) % 9 / 8 for position in positions]
        for each in (self.straight, self.stopped):
            each.observe(outcomes(positions, rates, source, self.step))

    @rule(positions=POSITIONS, seed=st.integers(0, 3), source=st.sampled_from(["fresh", "replay"]))
    def update(self, positions: list[int], seed: int, source: Any) -> None:
        # Prompts of even positions have a direction in common; every fifth group has no gradient.
        noise = np.random.default_rng(seed).normal(size=(len(positions), 8)).astype(np.float32)
        for each in (self.straight, self.stopped):
            each.observe_gradients(
                [
                    GroupSketch(row, f"p{one}", source, self.step, (vector + 3 * (one % 2 == 0)) * (one % 5 != 0))
                    for row, (one, vector) in enumerate(zip(positions, noise, strict=True))
                ]
            )

    @rule(n=st.integers(1, SIZE + 3))
    def references(self, n: int) -> None:
        one, other = (each.choose_references(n) for each in (self.straight, self.stopped))
        assert one == other
        assert len(set(one)) == min(n, SIZE)

    @rule()
    def save_and_load(self) -> None:
        state = saved_and_loaded(self.stopped.state_dict())
        self.stopped = made(self.name)
        self.stopped.load_state_dict(state)

    @invariant()
    def alike(self) -> None:
        if not hasattr(self, "straight"):
            return
        one, other = self.straight.forecast(), self.stopped.forecast()
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_array_equal(one, other)
            assert one.shape == (SIZE,) and ((one >= 0) & (one <= 1)).all()
        assert self.straight.metrics() == self.stopped.metrics()
        assert self.straight.explored_ids == self.stopped.explored_ids


@pytest.mark.parametrize("name", SELECTORS)
def test_a_restored_run_continues_identically(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    random_embeddings(monkeypatch, SIZE, 6)
    machine = type(f"Runs of {name}", (Runs,), {"name": name})
    runs, steps = RUNS.get(name, (12, 20))
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples(runs),
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )


def test_every_selector_is_fuzzed() -> None:
    """A new selector must be fuzzed too."""
    import datamodules.selectors as package

    kinds = {kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, Selector)}
    fuzzed = {type(make()) for make in SELECTORS.values()}
    assert {kind.__name__ for kind in kinds - fuzzed} == {"Selector", "Ranker"}
