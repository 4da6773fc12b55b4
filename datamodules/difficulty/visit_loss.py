"""Forecasts of several visits at once, where each visit measured its own part of the questions.

Attention weights do not depend on the visit, so one pass of the adapters serves all visits of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.difficulty.calibration import CLAMP
from datamodules.difficulty.heads import CalibrationHead


def average_measured(weights: Tensor, rates: Tensor) -> Tensor:
    """`[N, V]` averages of the references' rates, over the references measured at each visit.

    Dividing by the measured references' share of the weight is the softmax over them alone.

    Args:
        weights: `[N, K]`, rows sum to one.
        rates: `[K, V]`, NaN where not measured.

    Returns:
        NaN where no reference was measured at the visit.
    """
    measured = torch.isfinite(rates)
    share = weights @ measured.float()
    return torch.where(share > 0, weights @ torch.nan_to_num(rates) / share.clamp(min=1e-12), torch.nan)


def visit_forecasts(head: CalibrationHead, base: Tensor, references: Tensor) -> Tensor:
    """`[N, V]` calibrated forecasts.

    Args:
        head: calibration head.
        base: `[N, V]` uncalibrated forecasts.
        references: `[K, V]` rates of the references, NaN where not measured.
    """
    columns = []
    for visit in range(base.shape[1]):
        measured = references[torch.isfinite(references[:, visit]), visit]
        # Without a reference there is no base forecast either, and a head reads the references' mean.
        columns.append(head(base[:, visit], measured) if len(measured) else base[:, visit])
    return torch.stack(columns, dim=1)


def soft_loss(forecasts: Tensor, rates: Tensor) -> Tensor:
    """Mean soft-label cross-entropy of forecasts `[N, V]`, where rates `[N, V]` were measured and forecast."""
    kept = torch.isfinite(rates) & torch.isfinite(forecasts.detach())
    return F.binary_cross_entropy(forecasts[kept].clamp(CLAMP, 1 - CLAMP), rates[kept])
