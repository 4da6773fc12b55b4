"""LearnAlign: select prompts that are learnable and whose gradients align with the pool's (arXiv 2506.11480).

After a short warm-up by GRPO, each prompt has a success rate `p`, a learnability `V = p (1 - p)` and a GRPO gradient
`phi`, randomly projected. Its score is its mean learnability-weighted alignment with the pool, itself included:

    score_i = mean_j V_i V_j cos(phi_i, phi_j) = V_i u_i . mean_j (V_j u_j),    u = phi / |phi|

The right-hand side needs no Q x Q matrix: O(Q d).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from app.module import GRPOModule
from app.subsets.base import Column, Measured, OfflineMethod
from app.subsets.frozen_policy import FrozenPolicy
from app.subsets.gradients import PromptGradients, chosen_parameters
from app.subsets.pictures import learnalign_figure
from app.subsets.projection import Projection, check_projection, projection
from datamodules.errors import UserError
from datamodules.seeding import derive_seed
from datamodules.types import Prompt

_GRADIENT_BYTES = 512 * 2**20
"""Memory for the unprojected gradients of the prompts that are projected together."""
_BLOCK = 4096
"""Rows of features that are read at once to compute scores."""


@dataclass(frozen=True)
class LearnAlignOptions:
    """LearnAlign's settings.

    Args:
        warmup_steps: batches of `data.prompts_per_step` random prompts on which plain GRPO trains the policy before the
            measurements; 0 for none. Skipped when --ckpt_path names a policy.
        parameters: regular expression for the names of the trainable parameters whose gradients are taken. By default
            the LoRA parameters, or without LoRA those of the last layers.
        last_layers: number of last decoder layers that `parameters` defaults to.
        projection: "sparse" or "rademacher" signs, or "none" to keep whole gradients.
        dimension: numbers that a gradient is projected to, `d`; a multiple of 4.
    """

    warmup_steps: int = 10
    parameters: str = ""
    last_layers: int = 2
    projection: Literal["sparse", "rademacher", "none"] = "sparse"
    dimension: int = 4096

    def __post_init__(self) -> None:
        for name, least in (("warmup_steps", 0), ("last_layers", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--learnalign.{name} is {getattr(self, name)}; set it to {least} or more.")
        check_projection(self.projection, self.dimension)


class LearnAlign(OfflineMethod):
    """LearnAlign, as described at the top of this file."""

    _gradients: PromptGradients
    _projection: Projection

    def __init__(self, options: LearnAlignOptions) -> None:
        self.options = options
        self.warmup_steps = options.warmup_steps

    def check(self, module: GRPOModule) -> None:
        chosen_parameters(module.policy.on_meta(), self.options.parameters, self.options.last_layers)

    def prepare(self, policy: FrozenPolicy) -> dict[str, Column]:
        options, model = self.options, policy.module.policy_model
        self._gradients = PromptGradients(policy, chosen_parameters(model, options.parameters, options.last_layers))
        seed = derive_seed(policy.seed, "projection")
        self._projection = projection(options.projection, self._gradients.size, options.dimension, seed)
        return {
            "success_rate": Column("float64"),
            "completions": Column("int64"),
            "gradient_norm": Column("float64"),
            "feature": Column("float32", self._projection.dimension),
        }

    def measure(self, policy: FrozenPolicy, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        groups = policy.roll(prompts)
        norms, features = np.zeros(len(groups)), np.zeros((len(groups), self._projection.dimension), dtype=np.float32)
        # A group of equal rewards has neither gradient nor learnability.
        informative = [row for row, group in enumerate(groups) if group.informative]
        together = max(1, _GRADIENT_BYTES // (4 * self._gradients.size))
        for first in range(0, len(informative), together):
            rows = informative[first : first + together]
            gradients = torch.zeros(len(rows), self._gradients.size, device=policy.module.device)
            for place, row in enumerate(rows):
                self._gradients.add(groups[row], gradients[place])
            norms[rows] = gradients.norm(dim=1).double().cpu().numpy()
            features[rows] = self._projection(gradients).cpu().numpy()
        return {
            "success_rate": np.array([group.success_rate for group in groups]),
            "completions": np.array([len(group.completions) for group in groups], dtype=np.int64),
            "gradient_norm": norms,
            "feature": features,
        }

    def score(self, measured: Measured) -> np.ndarray:
        return alignment_scores(learnability(measured["success_rate"]), measured["feature"])

    def draw(self, measured: Measured, score: np.ndarray, kept: np.ndarray) -> Figure:
        return learnalign_figure(measured["success_rate"], score, kept)


def learnability(success_rate: np.ndarray) -> np.ndarray:
    """Return `p (1 - p)`, float64 `[Q]`; 0 if no completion could be scored."""
    return np.nan_to_num(success_rate * (1 - success_rate))


def alignment_scores(weight: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return `V_i u_i . mean_j (V_j u_j)`, float64 `[Q]`, in two passes over possibly memory-mapped features.

    The learnability `V` is float64 `[Q]`, the features are float32 `[Q, d]`; a row of zeros scores 0.
    """
    mean = np.zeros(features.shape[1])
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(features), _BLOCK)]
    for block in blocks:
        mean += weight[block] @ _unit(features[block])
    mean /= max(1, len(features))
    scores = [weight[block] * (_unit(features[block]) @ mean) for block in blocks]
    return np.concatenate(scores) if scores else np.zeros(0)


def _unit(features: np.ndarray) -> np.ndarray:
    """Normalise rows to length 1, float64; rows of zeros stay."""
    wide = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
