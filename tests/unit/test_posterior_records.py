"""selectors.Posterior on recorded runs that nothing was tuned on: it keeps its lead, and its promises are kept."""

from dataclasses import replace

import numpy as np
import pytest

from app.studies.forecast.recorded_run import Budget, read_traces
from app.studies.forecast.recorded_run import replay as play
from datamodules.selectors import Dots, Dps, Greso, Mopps, Pools, Posterior, SelectionContext, Uniform
from tests.support.records import POLICY, RECORDS, VISITS, record
from tests.support.tables import few

RIVALS = (Dps, Mopps, Greso, Pools, Dots, Uniform)


def scores(make, traces, folder, seeds, batch=40):
    """Return the informative share and the calibration error, means over the seeds."""
    budget, found = Budget(batch, batch if make is Dots else 0, 2), []
    for seed in range(seeds):
        context = SelectionContext(seed, "statistics", folder)
        run = play(make(), traces, budget, context, shown=traces.rates, samples=8)
        found.append((run.informative.mean(), run.calibration[-1]))
    return np.mean(found, axis=0)


def rivals(traces, folder, batch=40):
    """Return the informative shares of the other selectors by name, means over three seeds."""
    return {make.__name__: scores(make, traces, folder, 3, batch)[0] for make in RIVALS}


@pytest.mark.slow
@pytest.mark.parametrize("name", few(RECORDS, 1))
def test_leads_and_keeps_its_promises_on_records_kept_back(name, tmp_path):
    """The rival that is next best differs: where prompts are soon forgotten, one that explores little."""
    traces, _ = record(name)
    (share, error), others = scores(Posterior, traces, tmp_path, 2), rivals(traces, tmp_path)
    print(f"{name}: {share:.3f}, {others}, calibration error {error:.3f}")
    assert share > max(others.values())
    assert error < (0.06 if name == "sudden" else 0.05)  # few are informative there, so the level is learnt slowly


@pytest.mark.slow
def test_history_pays_on_an_rl_run_of_the_tiny_policy(tmp_path):
    """Ahead of all that look at history only in nine visits to three kinds of prompts, which Dots measures at once."""
    traces = read_traces(POLICY)
    (share, error), others = scores(Posterior, traces, tmp_path, 2, 48), rivals(traces, tmp_path, 48)
    print(f"policy: {share:.3f}, {others}, calibration error {error:.3f}")
    assert share > max(found for name, found in others.items() if name != "Dots") + 0.03


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["network", "late"])
def test_a_prior_helps_on_records_kept_back(name, tmp_path):
    traces, other = record(name)
    told = replace(traces, columns=tuple({"pass_rate": rate} for rate in other.tolist()))
    with_prior, without = (
        scores(lambda prior=prior: Posterior(prior=prior), told, tmp_path, 2)[0] for prior in ("pass_rate", None)
    )
    print(f"{name}: {with_prior:.3f} with, {without:.3f} without")
    assert with_prior > without + 0.02


def test_records_are_the_same_everywhere_and_move_as_they_say():
    for name in RECORDS:
        one, two = record(name)[0], record(name)[0]
        np.testing.assert_array_equal(one.rates, two.rates)
        assert one.questions == two.questions
    late = record("late")[0].rates.mean(0)
    assert abs(late[VISITS // 3] - late[0]) < 0.05 < 0.4 < late[-1] - late[0]
    network = record("network")[0].rates.mean(0)
    assert network[0] < 0.1 < 0.3 < network[-1]
    still = record("network", rates_of_learning=[0.0] * VISITS)[0].rates
    assert abs(still[:, 0].mean() - still[:, -1].mean()) < 0.02
