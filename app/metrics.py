"""What a training step logs: TRL's names where the meaning is TRL's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from app.minibatch import MiniBatch
from app.objective.packing import PackedBatch
from app.objective.statistics import Statistics
from datamodules.types import RolloutGroup


@dataclass(frozen=True, slots=True)
class TokensRead:
    """What the forward passes of an update cost.

    Attributes:
        positions: that the model computed, padding included.
        tokens: without padding.
        sequence_tokens: of prompts and completions, had every completion its own copy of its prompt.
    """

    positions: int = 0
    tokens: int = 0
    sequence_tokens: int = 0

    def plus(self, packed: PackedBatch) -> TokensRead:
        """With one more micro-batch."""
        return TokensRead(
            self.positions + packed.input_ids.numel(),
            self.tokens + packed.real_tokens,
            self.sequence_tokens + packed.sequence_tokens,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """What one optimizer step saw.

    Attributes:
        loss: scalar, the mini-batch's.
        grad_norm: scalar, before clipping.
        all: statistics of every completion token.
        replayed: statistics of replayed tokens.
        read: tokens of its forward passes.
        skipped: whether loss or gradient was not finite, so that the weights were left alone.
    """

    loss: Tensor
    grad_norm: Tensor
    all: Statistics
    replayed: Statistics
    read: TokensRead = TokensRead()
    skipped: bool = False


def batch_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Rewards and lengths of the groups that are trained on, and the share that teaches."""
    groups = [group for group in groups if group.completions]
    if not groups:
        return {}
    rewards = np.concatenate([group.rewards for group in groups])
    deviations = np.array([np.std(group.rewards, ddof=1) if len(group.rewards) > 1 else 0.0 for group in groups])
    metrics = {
        "reward": float(rewards.mean()),
        "reward_std": float(deviations.mean()),
        "frac_reward_zero_std": float(np.mean(deviations == 0)),
        "selection/informative_fraction": float(np.mean([group.informative for group in groups])),
    }
    for name in groups[0].components:
        values = np.concatenate([group.components[name] for group in groups])
        if not np.isnan(values).all():
            metrics[f"rewards/{name}/mean"] = float(np.nanmean(values))
            metrics[f"rewards/{name}/std"] = float(np.nanstd(values))
    return metrics | _lengths(groups)


def _lengths(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    completions = [completion for group in groups for completion in group.completions]
    lengths = np.array([len(completion.token_ids) for completion in completions])
    ended = np.array([completion.finish_reason == "stop" for completion in completions])
    metrics = {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return metrics


def update_metrics(updates: Sequence[Update], parts: Sequence[MiniBatch]) -> dict[str, float]:
    """Loss, gradient norm and ratios of a batch's optimizer steps."""
    merged, replayed = updates[0].all, updates[0].replayed
    for update in updates[1:]:
        merged, replayed = merged.merge(update.all), replayed.merge(update.replayed)
    norms = [float(update.grad_norm) for update in updates]
    tokens = sum(part.tokens for part in parts)
    positions = sum(update.read.positions for update in updates)
    whole = sum(update.read.sequence_tokens for update in updates)
    metrics = {
        "loss": float(np.mean([float(update.loss) for update in updates])),
        "grad_norm": float(np.mean(norms)),
        "updates/skipped": float(sum(update.skipped for update in updates)),
        "updates/empty": float(sum(not part.sequences for part in parts)),
        "updates/zero_advantage_token_fraction": sum(part.skipped_tokens for part in parts) / max(1, tokens),
    }
    if positions:
        metrics["updates/padding_fraction"] = 1 - sum(update.read.tokens for update in updates) / positions
        metrics["updates/positions_per_token"] = positions / whole
    return metrics | merged.metrics() | _replay_metrics(replayed.metrics())


def _replay_metrics(found: Mapping[str, float]) -> dict[str, float]:
    names = {
        "sampling/importance_sampling_ratio/mean": "replay/importance_ratio_mean",
        "sampling/importance_sampling_ratio/max": "replay/importance_ratio_max",
        "sampling/effective_sample_fraction": "replay/effective_sample_fraction",
        "clip_ratio/region_mean": "replay/clip_ratio",
    }
    return {ours: found[theirs] for theirs, ours in names.items() if theirs in found}
