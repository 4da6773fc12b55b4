"""Metrics of a training step, under TRL's names where the meaning is TRL's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from app.update.minibatch import MiniBatch
from app.update.records import Update
from datamodules.types import RolloutGroup

_REPLAY = {
    "sampling/importance_sampling_ratio/mean": "replay/importance_ratio_mean",
    "sampling/importance_sampling_ratio/max": "replay/importance_ratio_max",
    "sampling/effective_sample_fraction": "replay/effective_sample_fraction",
    "clip_ratio/region_mean": "replay/clip_ratio",
}
"""Names of the statistics that are logged for replayed tokens too."""


def batch_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return metrics of rewards and lengths of the trained groups, and their informative fraction.

    Means of rewards are those over prompts, each of which counts once, whatever the size of its group.
    """
    groups = [group for group in groups if group.completions]
    if not groups:
        return {}
    deviations = np.array([np.std(group.rewards, ddof=1) if len(group.rewards) > 1 else 0.0 for group in groups])
    metrics = {
        "reward": float(np.mean([group.rewards.mean() for group in groups])),
        "reward_std": float(deviations.mean()),
        "frac_reward_zero_std": float(np.mean(deviations == 0)),
        "selection/informative_fraction": float(np.mean([group.informative for group in groups])),
    }
    counted = np.concatenate([np.full(len(group.rewards), 1 / len(group.rewards)) for group in groups])
    for name in groups[0].components:
        values = np.concatenate([group.components[name] for group in groups])
        if (applies := ~np.isnan(values)).any():
            weights, values = counted[applies], values[applies].astype(np.float64)
            metrics[f"rewards/{name}/mean"] = mean = float(np.average(values, weights=weights))
            metrics[f"rewards/{name}/std"] = float(np.sqrt(np.average((values - mean) ** 2, weights=weights)))
    completions = [completion for group in groups for completion in group.completions]
    lengths = np.array([completion.generated_tokens for completion in completions])
    ended = np.array([completion.finish_reason == "stop" for completion in completions])
    metrics |= {
        "completions/mean_length": float(lengths.mean()),
        "completions/min_length": float(lengths.min()),
        "completions/max_length": float(lengths.max()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }
    if ended.any():
        metrics["completions/mean_terminated_length"] = float(lengths[ended].mean())
    return metrics


def update_metrics(updates: Sequence[Update], parts: Sequence[MiniBatch]) -> dict[str, float]:
    """Return metrics of a batch's optimizer steps: loss, gradient norm, tokens and ratios."""
    seen = [update.seen for update in updates]
    merged, replayed = seen[0].all, seen[0].replayed
    for one in seen[1:]:
        merged, replayed = merged.merge(one.all), replayed.merge(one.replayed)
    norms = [float(update.grad_norm) for update in updates]
    tokens = sum(part.tokens for part in parts)
    positions = sum(one.positions for one in seen)
    metrics = {
        "loss": float(np.mean([float(one.loss) for one in seen])),
        "grad_norm": float(np.mean(norms)),
        "learning_rate": updates[-1].learning_rate,
        "updates/skipped": float(sum(update.skipped for update in updates)),
        "updates/empty": float(sum(not part.sequences for part in parts)),
        "updates/zero_advantage_token_fraction": sum(part.skipped_tokens for part in parts) / max(1, tokens),
    }
    if positions:
        metrics["updates/padding_fraction"] = 1 - sum(one.tokens for one in seen) / positions
        metrics["updates/positions_per_token"] = positions / sum(one.sequence_tokens for one in seen)
    if found := [update.imbalance for update in updates if update.imbalance is not None]:
        metrics["ranks/update_token_imbalance"] = max(found)
    on_replay = replayed.metrics()
    return metrics | merged.metrics() | {ours: on_replay[name] for name, ours in _REPLAY.items() if name in on_replay}
