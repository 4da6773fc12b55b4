"""UFO-RL: select prompts on which the policy has medium confidence (arXiv 2505.12457).

The confidence in a prompt is the mean log-probability of the tokens of **one completion**, sampled from the policy as
in training (end token included, prompt excluded), under one teacher-forced forward pass of the policy at temperature 1.
No reward is computed. The prompts nearest the middle of the pool's confidences are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from app.objective.packing import collate, plan_microbatches
from app.policy.scoring import completion_logprobs
from app.subsets.base import Column, Measured, OfflineMethod
from app.subsets.frozen_policy import FrozenPolicy
from app.subsets.pictures import ufo_figure
from app.update.minibatch import sequence_of
from datamodules.types import Completion, Prompt


@dataclass(frozen=True)
class UfoOptions:
    """UFO-RL's settings.

    Args:
        middle: the middle of the confidences: their "median" or their "mean".
    """

    middle: Literal["median", "mean"] = "median"


class Ufo(OfflineMethod):
    """UFO-RL, as described at the top of this file."""

    def __init__(self, options: UfoOptions) -> None:
        self.options = options

    def prepare(self, policy: FrozenPolicy) -> dict[str, Column]:
        return {"confidence": Column("float64"), "tokens": Column("int64")}

    def measure(self, policy: FrozenPolicy, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        completions = policy.complete(prompts)
        return {
            "confidence": mean_logprobs(policy, prompts, completions),
            "tokens": np.array([one.generated_tokens for one in completions], dtype=np.int64),
        }

    def score(self, measured: Measured) -> np.ndarray:
        """Return minus the distance from the middle."""
        confidence = measured["confidence"]
        known = confidence[np.isfinite(confidence)]
        middle = np.median(known) if self.options.middle == "median" else np.mean(known)
        return np.where(np.isfinite(confidence), -np.abs(confidence - middle), -np.inf)

    def draw(self, measured: Measured, score: np.ndarray, kept: np.ndarray) -> Figure:
        return ufo_figure(measured["confidence"], kept)


@torch.no_grad()
def mean_logprobs(policy: FrozenPolicy, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> np.ndarray:
    """Return each completion's mean log-probability per token, float64 `[B]`, in nats; NaN for one without tokens."""
    module = policy.module
    means = np.full(len(completions), np.nan)
    written = [row for row, completion in enumerate(completions) if completion.generated_tokens]
    sequences = [sequence_of(prompts[row], completions[row], advantage=0.0, weight=0.0) for row in written]
    for rows in plan_microbatches([len(sequence) for sequence in sequences], module.max_tokens_per_microbatch):
        packed = collate([sequences[row] for row in rows], module.tokenizer.pad_token_id, module.device)
        with policy.precision():
            logprobs, _ = completion_logprobs(module.policy_model, packed, temperature=1.0, with_entropy=False)
        sizes = [sequences[row].generated_tokens for row in rows]
        for row, values in zip(rows, logprobs.double().cpu().split(sizes), strict=True):
            means[written[row]] = float(values.mean())
    return means
