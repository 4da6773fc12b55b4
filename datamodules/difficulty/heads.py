"""Calibration heads that are trained with the attention predictor (DOTS, arXiv 2506.05316, section 4 and its code)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # torch's own name for it

from datamodules.difficulty.calibration import CLAMP, CalibrationName


class CalibrationHead(nn.Module):
    """`p -> sigmoid(slope * logit(clamp(p, 1e-4, 1 - 1e-4)) + bias)`; this one is the identity ("none")."""

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        """Scalars (slope, bias) for a reference set with mean rewards `rates` `[K]`."""
        return rates.new_ones(()), rates.new_zeros(())

    def forward(self, base: Tensor, rates: Tensor) -> Tensor:
        """Calibrated success rates `[N]` of base forecasts `[N]`."""
        slope, bias = self.coefficients(rates)
        return torch.sigmoid(slope * torch.logit(base, eps=CLAMP) + bias)


class GroupLogitTemperature(CalibrationHead):
    """Temperature in [0.01, 10] and bias in (-1, 1) from the mean and the standard deviation of the reference rewards.

    It starts as the identity. The deviation is the population one, which a single reference also has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(2, 10), nn.ReLU(), nn.Linear(10, 2))
        last = self.network[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(torch.tensor([math.log(math.e - 1), 0.0]))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        output = self.network(torch.stack([rates.mean(), rates.std(correction=0)]))
        return 1 / F.softplus(output[0]).clamp(1e-2, 10), torch.tanh(output[1])


class Platt(CalibrationHead):
    """A learnt slope and bias, the same for all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(()))
        self.bias = nn.Parameter(torch.zeros(()))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        return self.slope, self.bias


class Temperature(CalibrationHead):
    """A learnt temperature, the same for all groups."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def coefficients(self, rates: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-self.log_temperature), rates.new_zeros(())


def make_head(name: CalibrationName) -> CalibrationHead:
    """A fresh head."""
    heads = {
        "group_logit_temperature": GroupLogitTemperature,
        "platt": Platt,
        "temperature": Temperature,
        "none": CalibrationHead,
    }
    return heads[name]()
