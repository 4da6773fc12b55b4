"""Forecast of a pool's success rates from the measured rates of a few reference prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from datamodules.difficulty.calibration import (
    Calibration,
    CalibrationHead,
    CalibrationName,
    fit_calibration,
    refit_line,
    soft_cross_entropy,
)

CHUNK = 8192


class Space(Protocol):
    """Vectors whose dot products weigh the references: `KernelSpace` or `AttentionSpace`.

    Attributes:
        queries: `[Q, D]` query vectors of the pool.
    """

    queries: np.ndarray

    def keys(self, positions: np.ndarray) -> np.ndarray:
        """Return the `[K, D]` key vectors of the prompts at `positions`."""

    def scale(self, similarity: np.ndarray, rates: np.ndarray) -> float:
        """Return the factor on the dot products, given those among the references `[K, K]` and their rates `[K]`."""


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """A forecast of the pool, `success_rate` float64 `[Q]`, its calibration and its factor on the similarities."""

    success_rate: np.ndarray
    calibration: Calibration
    scale: float


@dataclass(frozen=True, slots=True, eq=False)
class FittedForecaster:
    """A space whose factor and calibration were fitted to the measured rates of references.

    Attributes:
        space: vectors of the pool.
        keys: `[K, D]` key vectors of the references.
        rates: float64 `[K]` their measured success rates.
        scale: factor on the similarities.
        calibration: calibration of the softmax averages.
        held_out: float64 `[K]` calibrated forecast of every reference from the others; the rates where K is 1.
    """

    space: Space
    keys: np.ndarray
    rates: np.ndarray
    scale: float
    calibration: Calibration
    held_out: np.ndarray

    @property
    def loss(self) -> float:
        """Sum over the references of the soft-label cross-entropy of `held_out`, in nats."""
        return len(self.rates) * soft_cross_entropy(self.held_out, self.rates)

    def forecast(self) -> Forecast:
        """Forecast the success rate of every prompt in the pool, by a pass over its vectors."""
        base = softmax_average(self.space.queries, self.keys, self.rates, self.scale)
        return Forecast(self.calibration.apply(base), self.calibration, self.scale)


def fit_forecaster(
    space: Space,
    positions: np.ndarray,
    rates: np.ndarray,
    head: CalibrationHead | None,
    method: CalibrationName,
    refit: bool,
) -> FittedForecaster:
    """Fit a space to measured references.

    Args:
        space: vectors of the pool.
        positions: int64 `[K]` pool positions of the references, `K >= 1`.
        rates: float64 `[K]` success rates of the references in [0, 1].
        head: trained calibration head; None fits `method` to the references' leave-one-out forecasts.
        method: head to fit.
        refit: whether to fit a least-squares line to the references' leave-one-out forecasts afterwards.
    """
    keys = space.keys(positions)
    similarity = space.queries[positions].astype(np.float64) @ keys.astype(np.float64).T
    scale = space.scale(similarity, rates)
    calibration = Calibration()
    if head is not None:
        with torch.inference_mode():
            slope, bias = head.coefficients(torch.from_numpy(rates).float())
        calibration = Calibration(slope=float(slope), bias=float(bias))
    held_out = rates
    if len(rates) > 1:
        base = leave_one_out(similarity, rates, scale)
        if head is None:
            calibration = fit_calibration(base, rates, method)
        if refit:
            calibration = refit_line(calibration, base, rates)
        held_out = calibration.apply(base)
    return FittedForecaster(space, keys, rates, scale, calibration, held_out)


def predict(
    space: Space,
    positions: np.ndarray,
    rates: np.ndarray,
    head: CalibrationHead | None,
    method: CalibrationName,
    refit: bool,
) -> Forecast:
    """Forecast the success rate of every prompt in the pool; the arguments are those of `fit_forecaster`."""
    return fit_forecaster(space, positions, rates, head, method, refit).forecast()


def softmax_average(queries: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Return `softmax_i(scale * q . k_i) @ values` for every query, float64 `[Q]`, in chunks of `CHUNK x K` floats.

    `queries` `[Q, D]` are float16 or float32 and may be memory-mapped; `keys` are `[K, D]`, `values` `[K]`.
    """
    weights = torch.from_numpy(np.ascontiguousarray(keys, dtype=np.float32) * np.float32(scale)).T.contiguous()
    targets = torch.from_numpy(np.asarray(values, dtype=np.float32))
    out = np.empty(len(queries), dtype=np.float64)
    with torch.inference_mode():
        for start in range(0, len(queries), CHUNK):
            chunk = torch.from_numpy(np.asarray(queries[start : start + CHUNK])).float()
            attention = torch.softmax(chunk @ weights, dim=1)
            out[start : start + len(chunk)] = (attention @ targets).numpy()
    return out


def leave_one_out(similarity: np.ndarray, values: np.ndarray, scale: float) -> np.ndarray:
    """Return the softmax average of `values` `[K]` that each reference gets from the others, float64 `[K]`, `K >= 2`.

    Row i of `similarity` `[K, K]` has the dot products of reference i's query with every key.
    """
    logits = similarity * scale
    np.fill_diagonal(logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights @ values / weights.sum(axis=1)
