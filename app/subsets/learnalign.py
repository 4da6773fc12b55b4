"""LearnAlign: prompts that teach, and teach what the others teach (arXiv 2506.11480).

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
from app.subsets.bench import Bench
from app.subsets.gradients import PromptGradients, chosen_parameters
from app.subsets.pictures import learnalign_figure
from app.subsets.projection import Projection, check_projection, projection
from datamodules.errors import UserError
from datamodules.seeding import derive_seed
from datamodules.types import Prompt, RolloutGroup

_GRADIENT_BYTES = 512 * 2**20
"""Memory for the unprojected gradients of the few prompts that are projected together."""
_BLOCK = 4096
"""Features read at once while scores are computed."""


@dataclass(frozen=True)
class LearnAlignOptions:
    """LearnAlign's settings.

    Args:
        warmup_steps: batches of `data.prompts_per_step` random prompts that the policy is trained on by plain GRPO
            before anything is measured; 0 for none. Not done when --ckpt_path gives a policy.
        parameters: regular expression; gradients are taken in the trainable parameters whose name it is found in. By
            default the LoRA parameters, or without LoRA those of the last layers.
        last_layers: decoder layers, counted from the end, that are meant by that.
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
                raise UserError(f"--learnalign.{name}={getattr(self, name)}: expected at least {least}")
        check_projection(self.projection, self.dimension)


class LearnAlign(OfflineMethod):
    """See the top of this file."""

    _gradients: PromptGradients
    _projection: Projection

    def __init__(self, options: LearnAlignOptions) -> None:
        self.options = options
        self.warmup_steps = options.warmup_steps

    def check(self, module: GRPOModule) -> None:
        chosen_parameters(module.policy.on_meta(), self.options.parameters, self.options.last_layers)

    def prepare(self, bench: Bench) -> dict[str, Column]:
        options, model = self.options, bench.module.policy_model
        parameters = chosen_parameters(model, options.parameters, options.last_layers)
        self._gradients = PromptGradients(bench, parameters)
        seed = derive_seed(bench.seed, "projection")
        self._projection = projection(options.projection, self._gradients.size, options.dimension, seed)
        return {
            "success_rate": Column("float64"),
            "completions": Column("int64"),
            "gradient_norm": Column("float64"),
            "feature": Column("float32", self._projection.dimension),
        }

    def measure(self, bench: Bench, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        groups = bench.roll(prompts)
        norms, features = np.zeros(len(groups)), np.zeros((len(groups), self._projection.dimension), dtype=np.float32)
        # A group of equal rewards has no gradient, and no learnability either.
        teaching = [row for row, group in enumerate(groups) if group.informative]
        together = max(1, _GRADIENT_BYTES // (4 * self._gradients.size))
        for first in range(0, len(teaching), together):
            rows = teaching[first : first + together]
            norms[rows], features[rows] = self._project(bench, [groups[row] for row in rows])
        return {
            "success_rate": np.array([group.success_rate for group in groups]),
            "completions": np.array([len(group.completions) for group in groups], dtype=np.int64),
            "gradient_norm": norms,
            "feature": features,
        }

    def _project(self, bench: Bench, groups: Sequence[RolloutGroup]) -> tuple[np.ndarray, np.ndarray]:
        """Norms `[C]` and projections `[C, d]` of the gradients of a few groups."""
        gradients = torch.zeros(len(groups), self._gradients.size, device=bench.module.device)
        for row, group in enumerate(groups):
            self._gradients.add(group, gradients[row])
        return gradients.norm(dim=1).double().cpu().numpy(), self._projection(gradients).cpu().numpy()

    def score(self, measured: Measured) -> np.ndarray:
        return alignment_scores(learnability(measured["success_rate"]), measured["feature"])

    def draw(self, measured: Measured, score: np.ndarray, kept: np.ndarray) -> Figure:
        return learnalign_figure(measured["success_rate"], score, kept)


def learnability(success_rate: np.ndarray) -> np.ndarray:
    """`p (1 - p)` float64 `[Q]`; 0 where no completion could be scored."""
    return np.nan_to_num(success_rate * (1 - success_rate))


def alignment_scores(weight: np.ndarray, features: np.ndarray) -> np.ndarray:
    """`V_i u_i . mean_j (V_j u_j)` float64 `[Q]`, in two passes over the features.

    Args:
        weight: float64 `[Q]`: learnability `V`.
        features: float32 `[Q, d]` (may be memory-mapped); a row of zeros scores 0.
    """
    mean = np.zeros(features.shape[1])
    blocks = [slice(first, first + _BLOCK) for first in range(0, len(features), _BLOCK)]
    for block in blocks:
        mean += weight[block] @ _unit(features[block])
    mean /= max(1, len(features))
    scores = [weight[block] * (_unit(features[block]) @ mean) for block in blocks]
    return np.concatenate(scores) if scores else np.zeros(0)


def _unit(features: np.ndarray) -> np.ndarray:
    """Rows of length 1, float64; zeros stay."""
    wide = np.asarray(features, dtype=np.float64)
    norms = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.divide(wide, norms, out=np.zeros_like(wide), where=norms > 0)
