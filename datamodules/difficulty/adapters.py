"""From an embedding to the vector that attention compares: DOTS' network, or the score of a kernel ridge regression."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # torch's own name for it

ROWS = 2048
SAME = 1e-4
"""Squared distance below which an input is a centre, with room for float32 rounding."""


class InputScale(nn.Module):
    """`(x - shift) * scale` of every component; the identity until it is set. In training, components are dropped.

    Args:
        features: components `E`.
        dropout: probability of dropping one, in training.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, features: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.dropout = dropout

    def forward(self, embeddings: Tensor) -> Tensor:
        return F.dropout((embeddings - self.shift) * self.scale, self.dropout, self.training)


def mlp_adapter(features: int, width: int, depth: int, dropout: float) -> nn.Sequential:
    """LayerNorm, `depth` linear layers with GELU and dropout between them, LayerNorm (DOTS: three layers)."""
    layers: list[nn.Module] = [nn.LayerNorm(features)]
    for _ in range(depth - 1):
        layers += [nn.Linear(features, width), nn.GELU(), nn.Dropout(dropout)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, width), nn.LayerNorm(width))


class KernelScore(nn.Module):
    """The score of a kernel ridge regression, and what else is known of the text.

    Of scaled embeddings `u` `[N, E]` it gives `[N, 1 + R]`: first the score
    `gain * (sum_j a_j exp(-|u - c_j|^2 / 2) - own)`, then `u @ basis`.

    As the query and as the reference adapter of an attention predictor the score weighs reference i by `exp(s_q s_i)`:
    the references' success rates, tilted towards the side that it puts the question on. A training question's score
    has seen its own outcome; among the references that would make scores look surer than they are for other questions,
    so there `own`, what its own outcome adds, is taken off again. The references' `basis` is zero: attention does not
    read the text's components; a selector that compares prompts by their query vectors does.

    Args:
        centres: number of training questions `M`.
        features: components `E`.
        width: `1 + R`.
    """

    centres: Tensor
    coefficients: Tensor
    own: Tensor
    basis: Tensor
    gain: Tensor

    def __init__(self, centres: int, features: int, width: int) -> None:
        super().__init__()
        self.register_buffer("centres", torch.zeros(centres, features))
        self.register_buffer("coefficients", torch.zeros(centres))
        self.register_buffer("own", torch.zeros(centres))
        self.register_buffer("basis", torch.zeros(features, width - 1))
        self.register_buffer("gain", torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        norms = (self.centres**2).sum(1)
        parts = []
        for rows in inputs.split(ROWS):
            squared = (rows**2).sum(1, keepdim=True) + norms - 2 * rows @ self.centres.T
            same = (squared < SAME).float()
            score = torch.exp(-0.5 * squared.clamp(min=0)) @ self.coefficients - same @ self.own
            parts.append(torch.cat([self.gain * score[:, None], rows @ self.basis], dim=1))
        return torch.cat(parts)
