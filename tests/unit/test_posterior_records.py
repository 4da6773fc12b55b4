"""selectors.Posterior on recorded runs that nothing was tuned on: it keeps its lead, and its promises are kept."""

from dataclasses import replace

import numpy as np
import pytest

from app.studies.forecast.recorded_run import Budget
from app.studies.forecast.recorded_run import replay as play
from datamodules.selectors import Dps, Mopps, Posterior, SelectionContext
from tests.support.records import RECORDS, VISITS, record
from tests.support.tables import few


def scores(make, traces, folder, seeds):
    """Return the informative share of each seed, and the selectors."""
    selectors, shares = [make() for _ in range(seeds)], []
    for seed, one in enumerate(selectors):
        context = SelectionContext(seed, "statistics", folder)
        shares.append(play(one, traces, Budget(40), context, shown=traces.rates, samples=8).informative.mean())
    return np.array(shares), selectors


@pytest.mark.slow
@pytest.mark.parametrize("name", few(RECORDS, 1))
def test_leads_on_records_kept_back(name, tmp_path):
    """The rival that is next best differs: where prompts are soon forgotten, one that explores little."""
    traces, _ = record(name)
    ours, selectors = scores(Posterior, traces, tmp_path, 2)
    rivals = {make.__name__: scores(make, traces, tmp_path, 3)[0].mean() for make in (Dps, Mopps)}
    error = np.mean([one.metrics()["selection/informative_calibration_error"] for one in selectors])
    print(f"{name}: {ours.mean():.3f}, {rivals}, calibration error {error:.3f}")
    assert ours.mean() > max(rivals.values())
    # The network moves most, and its first promises are the worst.
    assert error < (0.08 if name == "network" else 0.05)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("name", ["network", "late"])
def test_a_prior_helps_on_records_kept_back(name, tmp_path):
    traces, other = record(name)
    told = replace(traces, columns=tuple({"pass_rate": rate} for rate in other.tolist()))
    with_prior, without = (
        scores(lambda prior=prior: Posterior(prior=prior), told, tmp_path, 2)[0].mean() for prior in ("pass_rate", None)
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
