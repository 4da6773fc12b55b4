"""Forecast of a whole pool's success rates from the measured rates of a few reference prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from datamodules.difficulty.attend import leave_one_out, softmax_average
from datamodules.difficulty.calibration import Calibration, CalibrationName, fit_calibration, refit_line
from datamodules.difficulty.heads import CalibrationHead


class Space(Protocol):
    """Where dot products say how much a reference tells about a prompt: `KernelSpace` or `AttentionSpace`."""

    queries: np.ndarray

    def keys(self, positions: np.ndarray) -> np.ndarray: ...
    def scale(self, similarity: np.ndarray, rates: np.ndarray) -> float: ...


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """What was predicted and how.

    Attributes:
        success_rate: float64 `[Q]`.
        calibration: the map from base forecasts to these.
        scale: factor on the similarities before the softmax.
    """

    success_rate: np.ndarray
    calibration: Calibration
    scale: float


def predict(
    space: Space,
    positions: np.ndarray,
    rates: np.ndarray,
    head: CalibrationHead | None,
    method: CalibrationName,
    refit: bool,
) -> Forecast:
    """Forecasts every prompt of the pool.

    Args:
        space: the pool's vectors.
        positions: int64 `[K]` pool positions of the references, `K >= 1`.
        rates: float64 `[K]` their success rates in [0, 1].
        head: trained calibration head; None to fit `method` on the references' leave-one-out forecasts.
        method: head that is fitted.
        refit: whether a least-squares line through the references' leave-one-out forecasts comes last.
    """
    keys = space.keys(positions)
    similarity = space.queries[positions].astype(np.float64) @ keys.astype(np.float64).T
    scale = space.scale(similarity, rates)
    calibration = _trained(head, rates) if head is not None else Calibration()
    if len(rates) > 1:
        without_itself = leave_one_out(similarity, rates, scale)
        if head is None:
            calibration = fit_calibration(without_itself, rates, method)
        if refit:
            calibration = refit_line(calibration, without_itself, rates)
    base = softmax_average(space.queries, keys, rates, scale)
    return Forecast(calibration.apply(base), calibration, scale)


def _trained(head: CalibrationHead, rates: np.ndarray) -> Calibration:
    with torch.inference_mode():
        slope, bias = head.coefficients(torch.from_numpy(rates).float())
    return Calibration(slope=float(slope), bias=float(bias))
