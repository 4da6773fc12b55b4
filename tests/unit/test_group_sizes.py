"""How many completions a prompt gets, what its group then is, and what refuses unlike sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from app.engines import Sampling
from callbacks import DynamicSampling, GroupSizes, Pilots, ReferenceRollouts, RolloutAhead, RolloutReplay
from callbacks.algorithm.size_allocation import GAINS, Gain, allocate, marginal_values
from datamodules.errors import UserError
from datamodules.selectors import Composed, Greso, Mopps, Posterior, Uniform
from datamodules.selectors.posterior import _informative_part
from datamodules.types import Outcomes
from tests.support.scripted_run import scripted_run
from tests.support.selector_builders import ready
from tests.support.trainers import trainer_with
from tests.unit.test_transformers_engine import assert_same


def worth(p: np.ndarray, n: int, gain: Gain) -> np.ndarray:
    i, j = GAINS[gain]
    return (1 - p**n - (1 - p) ** n) * p**i * (1 - p) ** j


@pytest.mark.parametrize("gain", GAINS)
def test_what_a_completion_adds_where_the_rate_is_known(gain: Gain) -> None:
    p = np.array([0.02, 0.3, 0.5, 0.97])
    found = marginal_values(p, np.zeros(4), gain, 2, 9)
    expected = np.stack([worth(p, n + 1, gain) - worth(p, n, gain) for n in range(2, 9)], axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("gain", GAINS)
def test_what_a_completion_adds_on_the_mean_of_a_beta(gain: Gain) -> None:
    """Against the integral over the density, by the midpoint rule."""
    p = (np.arange(200_000) + 0.5) / 200_000
    for a, b in ((2.0, 5.0), (1.5, 1.0), (30.0, 3.0)):
        density = p ** (a - 1) * (1 - p) ** (b - 1)
        density /= density.sum()
        mean = a / (a + b)
        deviation = np.sqrt(mean * (1 - mean) / (a + b + 1))
        found = marginal_values(np.array([mean]), np.array([deviation]), gain, 1, 33)[0]
        expected = [density @ (worth(p, n + 1, gain) - worth(p, n, gain)) for n in range(1, 33)]
        np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-9)


def test_rates_at_the_ends_and_deviations_that_no_rate_has() -> None:
    found = marginal_values(np.array([0.0, 1.0, 0.5, 0.2]), np.array([0.0, 0.3, 7.0, 0.4]), "equal", 2, 300)
    assert np.isfinite(found).all() and (found >= 0).all()
    assert (np.diff(found, axis=1) <= 1e-15).all()


@pytest.mark.parametrize("gain", GAINS)
def test_the_allocation_is_the_best_of_all(gain: Gain) -> None:
    generator = np.random.default_rng(3)
    for _ in range(20):
        smallest, largest, prompts = 2, int(generator.integers(4, 8)), 4
        mean, deviation = generator.random(prompts), generator.random(prompts) * 0.4
        budget = int(generator.integers(prompts * smallest, prompts * largest + 1))
        marginals = marginal_values(mean, deviation, gain, smallest, largest)
        sizes = allocate(marginals, smallest, budget)
        assert sizes.sum() == budget and sizes.min() >= smallest and sizes.max() <= largest
        totals = np.pad(marginals.cumsum(axis=1), ((0, 0), (1, 0)))

        def value(its: Sequence[int], totals: np.ndarray = totals, smallest: int = smallest) -> float:
            return float(sum(totals[row, size - smallest] for row, size in enumerate(its)))

        choices = itertools.product(range(smallest, largest + 1), repeat=prompts)
        best = max(value(its) for its in choices if sum(its) == budget)
        assert value(sizes.tolist()) == pytest.approx(best, rel=1e-12)


def test_prompts_that_are_alike_get_alike_and_rare_outcomes_get_more() -> None:
    known = np.zeros(4)
    assert sorted(allocate(marginal_values(np.full(4, 0.3), known, "equal", 2, 32), 2, 30)) == [7, 7, 8, 8]
    few, some, many, hopeless = allocate(
        marginal_values(np.array([0.5, 0.2, 0.06, 0.001]), known, "equal", 2, 64), 2, 40
    )
    assert few < some < many and hopeless == 2


class Known(Mopps):
    """Forecasts that the test gives; notes what it observes."""

    def __init__(self, rates: Sequence[float], deviation: float = 0.0) -> None:
        super().__init__()
        self.rates, self.deviation, self.seen = np.array(rates), deviation, list[Outcomes]()

    def forecast(self) -> np.ndarray:
        return self.rates

    def forecast_deviation(self) -> np.ndarray:
        return np.full(len(self.rates), self.deviation)

    def metrics(self) -> dict[str, float]:
        return {}

    def observe(self, outcomes: Outcomes) -> None:
        self.seen.append(outcomes)


RATES = [(0.5, 0.1, 0.9)[i % 3] for i in range(12)]
PATTERN = [[float((i + g) % 3 == 0) for g in range(4)] * 8 for i in range(12)]


def run(folder: Any, monkeypatch: pytest.MonkeyPatch, callbacks: Sequence[Any], selector: Any, **options: Any) -> Any:
    """A run in which 8 completions of a prompt are generated on average, and up to 32 have their score."""
    sampling = {"num_generations": 8, "max_completion_length": 5}
    with monkeypatch.context() as patched:
        patched.setattr("tests.support.scripted_run.Sampling", lambda **given: Sampling(**sampling))
        return scripted_run(folder, patched, PATTERN, callbacks, selector=selector, **options)


def test_a_group_is_the_beginning_of_a_larger_one_and_everything_is_counted(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    selector = Known(RATES)
    sized = run(tmp_path, monkeypatch, [GroupSizes(gain="equal")], selector, steps=1, prompts_per_step=6)
    (step,) = sized.steps
    sizes = {one.prompt.id: len(one.completions) for one in step.groups}
    assert list(sizes) == step.prompts and sum(sizes.values()) == 48 == step.counts["train/completions"]
    middle = [sizes[name] for name in step.prompts if int(name[1:]) % 3 == 0]
    others = [sizes[name] for name in step.prompts if int(name[1:]) % 3]
    assert max(middle) < 8 < min(others) and max(others) - min(others) <= 1
    assert (step.metrics["group_size/min"], step.metrics["group_size/max"]) == (min(middle), max(others))
    chances = {
        name: [worth(np.array([RATES[int(name[1:])]]), n, "equal").item() for n in (size, 8)]
        for name, size in sizes.items()
    }
    told = step.metrics["group_size/informative_forecast"], step.metrics["group_size/informative_if_equal"]
    assert told == pytest.approx(np.mean(list(chances.values()), axis=0))
    assert told[0] > told[1]
    (seen,) = selector.seen
    assert seen.group_size == 8
    assert dict(zip(seen.prompt_ids, seen.samples.tolist(), strict=True)) == sizes
    # The same prompts in groups of 8, and in groups of 32.
    for generations in (8, 32):
        whole = scripted_run(
            tmp_path, monkeypatch, [one[:generations] for one in PATTERN], [], selector=Known(RATES), steps=1,
            prompts_per_step=6, max_completion_length=5,
        ).steps[0]  # fmt: skip
        assert whole.prompts == step.prompts
        for ours, theirs in zip(step.groups, whole.groups, strict=True):
            common = min(len(ours.completions), generations)
            assert common == generations or len(ours.completions) < generations
            assert_same(ours.completions[:common], theirs.completions[:common])
            assert ours.rewards[:common].tolist() == theirs.rewards[:common].tolist()
    # Every prompt counts once in the means.
    assert step.metrics["reward"] == pytest.approx(np.mean([one.rewards.mean() for one in step.groups]))


def test_replay_and_refills_keep_the_budget(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    callbacks = [GroupSizes(smallest=2, largest=16), DynamicSampling(max_refills=2), RolloutReplay(0.5, capacity=8)]
    steps = run(tmp_path, monkeypatch, callbacks, Known(RATES, 0.2), steps=3, prompts_per_step=4).steps
    for step in steps:
        assert step.counts["train/completions"] == 8 * step.counts["train/prompts"]
        assert len({len(one.completions) for one in step.groups + step.dropped}) > 1
    assert any(one.source == "replay" for step in steps for one in step.groups)


def test_before_the_first_forecast_all_groups_are_alike(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    selector = Known(RATES)
    monkeypatch.setattr(selector, "forecast", lambda: None)
    (step,) = run(tmp_path, monkeypatch, [GroupSizes()], selector, steps=1).steps
    assert [len(one.completions) for one in step.groups] == [8] * 4
    assert "group_size/max" not in step.metrics
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "completions of a prompt" in line)
    assert "8 on average" in row and "2 to 32" in row


def test_posterior_asks_for_the_mean_size_and_learns_from_every_completion() -> None:
    # Of 8 completions, 2 right, 4 drawn without replacement are alike with 15/70; 1 of 8: 35/70; 0: always.
    found = _informative_part(np.array([0.25, 0.125, 0.0]), np.array([8, 8, 8]), 4)
    np.testing.assert_allclose(found, [1 - 15 / 70, 1 - 35 / 70, 0.0])
    assert _informative_part(np.array([0.25, 0.5]), np.array([4, 4]), 4).tolist() == [1, 1]

    def learnt(samples: int, group_size: int | None) -> tuple[int, list[float], float]:
        selector = ready(Posterior(use_embeddings=False, learn_constants=False), 12)
        names, counts = selector.choose(2), np.array([samples, samples])
        selector.observe(Outcomes(0, names, np.array([0.0, 0.5]), counts, "fresh", np.array([0.0, 0.5]), group_size))
        state = selector.state_dict()
        forecast = selector.forecast()[selector.pool.positions(names)].max()
        return state["group"], state["calibration"]["weights"].tolist(), float(forecast)

    assert [learnt(samples, 8)[0] for samples in (2, 8, 32)] == [8, 8, 8] and learnt(32, None)[0] == 32
    # A pair does not tell whether eight differ, a group of 32 does; the rates teach alike.
    untaught = ready(Posterior(use_embeddings=False), 12).state_dict()["calibration"]["weights"].tolist()
    assert learnt(2, 8)[1] == untaught != learnt(32, 8)[1]
    assert learnt(32, 8)[2] == learnt(32, None)[2]


def check(sizes: GroupSizes, *others: Any, selector: Any = None, generations: int = 8) -> None:
    module: Any = type("Module", (), {"sampling": Sampling(num_generations=generations)})
    data: Any = type("Data", (), {"selector": selector or Mopps()})
    sizes.check(trainer_with(callbacks=[sizes, *others]), module, data)


def test_what_cannot_be_combined_is_refused() -> None:
    check(GroupSizes(), RolloutAhead(staleness=0), ReferenceRollouts(), DynamicSampling(), RolloutReplay())
    check(GroupSizes(8, 8), selector=Composed(Posterior()))
    for selector in (Uniform(), Greso(), Composed(Uniform())):
        with pytest.raises(
            UserError, match=rf"selectors\.{type(selector).__name__} forecasts none\. .*such as Posterior"
        ):
            check(GroupSizes(), selector=selector)
    for other, told in (
        (RolloutAhead(), r"RolloutAhead generates groups of one size .* or set staleness=0"),
        (ReferenceRollouts(with_training=True), r"with_training=true.*Set with_training=false"),
        (Pilots(), r"GroupSizes and callbacks\.Pilots both decide.*Remove one"),
    ):
        with pytest.raises(UserError, match=told):
            check(GroupSizes(), other)
    for sizes in (GroupSizes(smallest=9), GroupSizes(largest=7)):
        with pytest.raises(UserError, match=r"num_generations, the mean, is 8\. Choose bounds around it"):
            check(sizes)
    with pytest.raises(UserError, match="smallest is 1, expected at least 2"):
        GroupSizes(1)
    with pytest.raises(UserError, match=r"'varianze'; .*variance"):
        GroupSizes(gain="varianze")  # type: ignore[arg-type]
