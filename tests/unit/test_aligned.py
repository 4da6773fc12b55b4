"""selectors.Aligned: measured agreement, its forecast, the bound on variety, restoring and a million prompts."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from datamodules.errors import UserError
from datamodules.selectors import Aligned, Composed, Posterior, SelectionContext
from datamodules.selectors.aligned import bounded, spread
from datamodules.selectors.alignment import Forecast, GradientMemory
from datamodules.types import GroupSketch, Source
from tests.support.selector_builders import outcomes, pool_of, saved_and_loaded

SIZE, WIDTH, NUMBERS = 300, 6, 64
KIND = np.arange(SIZE) % 3


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that tell three kinds of prompts apart."""
    vectors = np.random.default_rng(0).normal(size=(SIZE, WIDTH)).astype(np.float32)
    vectors[np.arange(SIZE), KIND] += 8
    monkeypatch.setattr("datamodules.selectors.posterior.embed_with", lambda *_: (vectors, "key"))


def ready(selector: Aligned | Posterior | Composed, folder: Path) -> Aligned:
    pool = pool_of([str(i) for i in range(SIZE)])
    selector.setup(pool, SelectionContext(seed=7, policy_path="policy", cache_dir=folder))
    return selector  # type: ignore[return-value]


def sketches(positions: np.ndarray, common: float, seed: int = 0, source: Source = "fresh") -> list[GroupSketch]:
    """Gradients of noise, those of kind 0 with a direction in common."""
    noise = np.random.default_rng(seed).normal(size=(len(positions), NUMBERS))
    noise[:, 0] += common * (KIND[positions] == 0)
    return [GroupSketch(i, f"p{one}", source, 0, vector.astype(np.float32)) for i, (one, vector) in
            enumerate(zip(positions, noise, strict=True))]  # fmt: skip


def taught(selector: Aligned, common: float, steps: int = 20) -> Aligned:
    """Groups of 9 prompts a step, all informative, of the first half of the pool."""
    for step in range(steps):
        selector.begin_step()
        positions = np.random.default_rng(step).choice(SIZE // 2, 9, replace=False)
        selector.observe(outcomes(positions, np.full(9, 0.5)))
        selector.observe_gradients(sketches(positions, common, step))
    return selector


def test_agreement_is_the_weighted_mean_cosine_with_groups_of_other_prompts() -> None:
    units = np.array([[1, 0], [0.6, 0.8], [0, 1], [1, 0]], dtype=np.float32)
    memory = GradientMemory(np.array([4, 2, 9, 4]), units, np.array([1.0, 2.0, 1.0, 3.0]), np.full(4, np.nan))
    found, noise = memory.agreement()
    # The first with (0.6, 0.8) twice and (0, 1) once; the second with (1, 0) four times and (0, 1) once.
    assert found == pytest.approx([2 * 0.6 / 3, (4 * 0.6 + 0.8) / 5, 2 * 0.8 / 6, 2 * 0.6 / 3])
    first, third = (4 * 0.2**2 + 0.4**2) / 9, (4 * (1.6 / 3) ** 2 + 10 * (0.8 / 3) ** 2) / 36
    assert noise == pytest.approx(np.mean([first, (10 * 0.04**2 + 0.16**2) / 25, third, first]))


def test_the_memory_holds_the_latest_groups_however_many_come_at_once() -> None:
    def groups(first: int, count: int) -> GradientMemory:
        rows = np.arange(first, first + count)
        return GradientMemory(rows, np.ones((count, 2), dtype=np.float32), np.ones(count), np.ones(count))

    memory = GradientMemory.empty().joined(groups(0, 12), 8)
    assert memory.positions.tolist() == list(range(4, 12))
    memory = memory.joined(groups(12, 3), 8)
    assert memory.positions.tolist() == list(range(7, 15))
    assert memory.units.shape == (8, 2)


def test_the_positive_part_is_that_of_a_gaussian() -> None:
    draws = np.random.default_rng(0).normal(size=400_000)
    mean, deviation = np.array([0.0, 1.0, -2.0]), np.array([1.0, 0.5, 1.5])
    found = Forecast(mean, deviation**2).positive_part()
    assert found == pytest.approx(np.maximum(mean + deviation * draws[:, None], 0).mean(0), abs=0.005)
    assert found[0] == pytest.approx(1 / np.sqrt(2 * np.pi))


def test_prompts_never_tried_are_aligned_as_those_of_their_kind(tmp_path: Path) -> None:
    selector = taught(ready(Aligned(), tmp_path), common=6.0)
    forecast = selector._gradients.forecast(selector._features)
    assert forecast is not None
    untried = forecast.mean[SIZE // 2 :]
    kinds = [untried[KIND[SIZE // 2 :] == kind].mean() for kind in range(3)]
    # A third of the groups agree with one another by 36 / (36 + 63), with the others not at all.
    assert kinds[0] == pytest.approx(0.36 / 3, abs=0.04)
    assert max(kinds[1:]) < 0.03
    chosen = np.concatenate([selector.pool.positions(selector.choose(8)) for _ in range(60)])
    assert (KIND[chosen] == 0).mean() > 0.5
    metrics = selector.metrics()
    assert metrics["selection/alignment_pearson"] > 0.7
    assert 0 < metrics["selection/alignment_strength"] <= 1
    assert metrics["selection/alignment_mean"] == pytest.approx(forecast.mean.mean())
    # The three kinds are as informative, so a third of the pool is half of what Posterior would spread over at least.
    assert metrics["selection/pool_share"] >= 0.5 * spread(_logits(selector)) / SIZE


def test_a_prompt_is_told_from_its_kind_by_its_own_gradients(tmp_path: Path) -> None:
    selector = ready(Aligned(), tmp_path)
    # Prompt 0 is of kind 0 but without its direction, prompt 1 of kind 1 with it.
    for step in range(8):
        positions = np.concatenate([[0, 1], 3 + np.random.default_rng(step).choice(60, 12, replace=False)])
        given = sketches(positions, 6.0, step)
        given[0].vector[0], given[1].vector[0] = given[0].vector[0] - 6, given[1].vector[0] + 6
        selector.observe_gradients(given)
    forecast = selector._gradients.forecast(selector._features)
    assert forecast is not None
    assert forecast.mean[1] > forecast.mean[KIND == 1].mean() + 0.03
    assert forecast.mean[0] < forecast.mean[KIND == 0].mean() - 0.03
    assert forecast.variance[0] < forecast.variance[299]


def _logits(selector: Aligned) -> np.ndarray:
    informative = selector._placed().read(selector._tabulated().informative)
    return np.log(informative) / selector.temperature


@pytest.mark.parametrize("how", ["no gradients", "noise", "replayed", "none of the update"])
def test_without_agreement_the_draw_is_that_of_posterior(tmp_path: Path, how: str) -> None:
    plain, selector = ready(Posterior(temperature=0.3), tmp_path), ready(Aligned(temperature=0.3), tmp_path)
    for step in range(12):
        positions = np.random.default_rng(step).choice(SIZE, 9, replace=False)
        given = sketches(positions, 6.0 if how == "replayed" else 0.0, step, "replay" if how == "replayed" else "fresh")
        for one in given if how == "none of the update" else []:
            one.vector[:] = 0
        for each in (plain, selector):
            each.begin_step()
            each.observe(outcomes(positions, np.arange(9) / 8))
            each.observe_gradients([] if how == "no gradients" else given)
    one, other = (each.priorities(8, np.random.default_rng(5)) for each in (plain, selector))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)
    assert selector.metrics()["selection/alignment_strength"] == 0


def test_variety_bounds_how_far_alignment_goes() -> None:
    logits, advantage = np.zeros(1000), np.where(np.arange(1000) < 100, 3.0, 0.0)
    assert spread(logits) == pytest.approx(1000)
    # Unbounded, a hundred prompts weigh e^3 each and 900 weigh 1.
    whole = (100 * np.e**3 + 900) ** 2 / (100 * np.e**6 + 900)
    assert bounded(logits, advantage, 0.1) == (1.0, pytest.approx(whole))
    strength, found = bounded(logits, advantage, 0.5)
    assert 0 < strength < 1
    assert 500 <= found < 510
    assert found == pytest.approx(spread(logits + strength * advantage))
    assert bounded(logits, advantage, 1.0) == (0.0, pytest.approx(1000))


def test_a_kind_that_is_favoured_counts_less_in_the_mean_gradient(tmp_path: Path) -> None:
    selector = taught(ready(Aligned(variety=0.3), tmp_path), common=6.0)
    selector.choose(8)
    selector.observe_gradients(sketches(np.array([297, 298]), 6.0))  # of kinds 0 and 1
    favoured, other = selector._gradients.weights[-2:]
    assert 0.25 <= favoured < 1 < other <= 4


def test_a_restored_selector_chooses_the_same(tmp_path: Path) -> None:
    one = taught(ready(Composed(Aligned(memory=64), cool_down=1), tmp_path), common=6.0)  # type: ignore[arg-type]
    one.choose(8)
    other = ready(Composed(Aligned(memory=64), cool_down=1), tmp_path)
    other.load_state_dict(saved_and_loaded(one.state_dict()))
    assert one.uses_sketches
    assert one.metrics() == other.metrics()
    for step in range(3):
        assert one.choose(8) == other.choose(8)
        for each in (one, other):
            each.observe_gradients(sketches(np.arange(9), 6.0, step))
    assert len(one.state_dict()["ranker"]["gradients"]["positions"]) == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature is 0, expected a finite number above 0"),
        ({"variety": 0}, r"variety is 0, expected a number in \(0, 1\]. Use 1 to choose without alignment"),
        ({"variety": 1.5}, r"variety is 1.5, expected a number in \(0, 1\]"),
        ({"memory": 7}, "memory is 7, expected at least 8 groups"),
    ],
)
def test_wrong_arguments_are_one_line_errors(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Aligned(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_million_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    size, width = 1_000_000, 64
    features = np.random.default_rng(0).normal(size=(size, width)).astype(np.float32) / 8
    monkeypatch.setattr(Posterior, "_embed", lambda *_: features)
    selector = Aligned(memory=1024)
    selector.setup(pool_of([f"{i}" for i in range(size)]), SelectionContext(seed=0))
    selector.pool.positions(["p0"])
    seconds = []
    for step in range(3):
        start = time.process_time()
        chosen = selector.choose(512)
        seconds.append(time.process_time() - start)
        rng = np.random.default_rng(step)
        positions = selector.pool.positions(chosen)
        selector.observe(outcomes(positions, rng.binomial(8, 0.4, 512) / 8, "fresh", step))
        vectors = rng.normal(size=(512, 1024)).astype(np.float32)
        vectors[:, 0] += 20 * (features[positions, 0] > 0)
        start = time.process_time()
        selector.observe_gradients([GroupSketch(i, one, "fresh", step, vectors[i]) for i, one in enumerate(chosen)])
        seconds[-1] += time.process_time() - start
    print(f"seconds of processor per choice {np.round(seconds, 2)}")
    assert selector.metrics()["selection/alignment_strength"] > 0
    assert min(seconds[1:]) < 2
