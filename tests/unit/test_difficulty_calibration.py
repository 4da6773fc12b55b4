"""Calibration against direct formulas, a general-purpose optimiser and numbers worked by hand."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from datamodules.difficulty.calibration import BOUNDS, HEADS, Calibration, fit_calibration, refit_line
from datamodules.difficulty.forecaster import leave_one_out, softmax_average
from datamodules.difficulty.kernel import TEMPERATURES, KernelSpace, fit_temperature


def references(seed: int, k: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = rng.uniform(0.02, 0.98, k)
    rates = rng.binomial(8, truth) / 8
    return 1 / (1 + np.exp(-(0.3 * np.log(truth / (1 - truth)) - 0.8))), rates


def penalised_loss(theta: np.ndarray, base: np.ndarray, rates: np.ndarray) -> float:
    p = 1 / (1 + np.exp(-(theta[0] * np.log(base / (1 - base)) + theta[1])))
    cross_entropy = -np.sum(rates * np.log(p) + (1 - rates) * np.log(1 - p))
    return cross_entropy + 0.5 * ((theta[0] - 1) ** 2 + theta[1] ** 2)


@pytest.mark.parametrize("method", sorted(BOUNDS))
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fit_is_the_constrained_optimum(method, seed):
    base, rates = references(seed)
    fitted = fit_calibration(base, rates, method)
    (low_slope, low_bias), (high_slope, high_bias) = BOUNDS[method]
    best = minimize(
        penalised_loss, [1.0, 0.0], args=(base, rates), bounds=[(low_slope, high_slope), (low_bias, high_bias)],
        options={"ftol": 1e-14, "gtol": 1e-9},
    )  # fmt: skip
    np.testing.assert_allclose([fitted.slope, fitted.bias], best.x, atol=2e-4)


def test_bounds_are_reached_and_kept():
    base = np.full(100, 0.5) + np.tile([0.01, -0.01], 50)
    fitted = fit_calibration(base, np.ones(100), "group_logit_temperature")
    assert fitted.bias == 1.0
    assert fit_calibration(base, np.ones(100), "platt").bias > 1.5


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("method", sorted(BOUNDS))
def test_constant_rewards_leave_the_forecast(method, value):
    fitted = refit_line(
        fit_calibration(np.full(64, value), np.full(64, value), method), np.full(64, value), np.full(64, value)
    )
    assert fitted.apply(np.array([value]))[0] == pytest.approx(value, abs=2e-3)
    assert 0.5 < fitted.slope < 2
    assert abs(fitted.bias) < 0.5


def test_apply_by_hand():
    # logit(0.8) = log 4; slope 1/2 -> log 2; bias log 3 -> log 6 -> 6/7; gain 0.5, offset 0.1.
    calibration = Calibration(slope=0.5, bias=np.log(3), gain=0.5, offset=0.1)
    assert calibration.apply(np.array([0.8]))[0] == pytest.approx(0.5 * 6 / 7 + 0.1, abs=1e-12)
    assert calibration.temperature == 2.0
    assert Calibration(gain=3.0).apply(np.array([0.9]))[0] == 1.0
    assert Calibration().apply(np.array([0.0]))[0] == pytest.approx(1e-4)


def test_refit_is_ordinary_least_squares():
    base, rates = references(5)
    fitted = refit_line(Calibration(), base, rates)
    gain, offset = np.polyfit(base, rates, 1)
    np.testing.assert_allclose([fitted.gain, fitted.offset], [gain, offset], rtol=1e-9)


def test_refit_guards():
    base = np.linspace(0.1, 0.9, 9)
    for rates in (np.zeros(9), 1 - base):
        assert refit_line(Calibration(slope=2.0), base, rates) == Calibration(slope=2.0)
    assert refit_line(Calibration(), np.full(9, 0.3), base) == Calibration()


def test_trained_head_formula():
    torch.manual_seed(0)
    head = HEADS["group_logit_temperature"]()
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    rates, base = torch.rand(20), torch.tensor([0.0, 0.3, 0.9])
    w1, b1, w2, b2 = (parameter.detach().numpy().astype(np.float64) for parameter in head.parameters())
    o = w2 @ np.maximum(w1 @ np.array([rates.mean(), rates.numpy().std()]) + b1, 0) + b2
    temperature, bias = np.clip(np.log1p(np.exp(o[0])), 1e-2, 10), np.tanh(o[1])
    p = np.clip(base.numpy().astype(np.float64), 1e-4, 1 - 1e-4)
    expected = 1 / (1 + np.exp(-(np.log(p / (1 - p)) / temperature + bias)))
    np.testing.assert_allclose(head(base, rates).detach().numpy(), expected, rtol=2e-4)


@pytest.mark.parametrize("method", sorted(BOUNDS))
def test_heads_start_as_identity(method):
    base = torch.tensor([0.2, 0.5, 0.7])
    np.testing.assert_allclose(HEADS[method]()(base, torch.rand(10)).detach().numpy(), base.numpy(), atol=1e-6)


def brute_force_leave_one_out(cosines: np.ndarray, rates: np.ndarray, temperature: float) -> list[float]:
    forecasts = []
    for i in range(len(rates)):
        others = [j for j in range(len(rates)) if j != i]
        weights = [np.exp(cosines[i, j] / temperature) for j in others]
        forecasts.append(sum(w * rates[j] for w, j in zip(weights, others, strict=True)) / sum(weights))
    return forecasts


def test_temperature_fit_against_brute_force():
    rng = np.random.default_rng(3)
    z = rng.normal(size=(30, 5))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    cosines = z @ z.T
    rates = 1 / (1 + np.exp(-3 * z[:, 0]))
    losses = []
    for temperature in TEMPERATURES:
        p = np.clip(brute_force_leave_one_out(cosines, rates, temperature), 1e-4, 1 - 1e-4)
        losses.append(-np.mean(rates * np.log(p) + (1 - rates) * np.log(1 - p)))
        np.testing.assert_allclose(
            np.clip(leave_one_out(cosines, rates, 1 / temperature), 1e-4, 1 - 1e-4), p, rtol=1e-9
        )
    assert 0 < np.argmin(losses) < len(TEMPERATURES) - 1
    assert fit_temperature(cosines, rates) == TEMPERATURES[np.argmin(losses)]
    assert fit_temperature(cosines, np.full(30, 0.25)) == TEMPERATURES[0]


def test_softmax_average_crosses_chunks(monkeypatch):
    monkeypatch.setattr("datamodules.difficulty.forecaster.CHUNK", 7)
    rng = np.random.default_rng(0)
    queries, keys, values = rng.normal(size=(23, 4)), rng.normal(size=(6, 4)), rng.uniform(size=6)
    weights = np.exp(3.0 * queries @ keys.T)
    expected = weights @ values / weights.sum(1)
    result = softmax_average(queries.astype(np.float32), keys.astype(np.float32), values, 3.0)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_kernel_space_is_principal_components_of_centred_vectors(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.difficulty.kernel.CHUNK", 16)
    rng = np.random.default_rng(1)
    embeddings = (rng.normal(size=(50, 9)) * np.arange(1, 10) + 5).astype(np.float32)
    centred = embeddings - embeddings.mean(0)
    for rank, reference in ((9, centred), (3, centred @ np.linalg.svd(centred, full_matrices=False)[2][:3].T)):
        unit = reference / np.linalg.norm(reference, axis=1, keepdims=True)
        queries = KernelSpace(embeddings, "key", tmp_path, rank=rank).queries
        np.testing.assert_allclose(queries @ queries.T, unit @ unit.T, atol=2e-5)
