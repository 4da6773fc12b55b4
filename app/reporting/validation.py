"""Validation metrics: accuracy, pass@k, maj@k, reward and completion length over the prompts of a set."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torchmetrics import MeanMetric, Metric, SumMetric

from app.rewards.base import EXTRACTED_ANSWER
from datamodules.types import RolloutGroup
from datamodules.validation import tag_value

CORRECT = 0.5
"""A completion counts as correct when its correctness reward is above this."""


class PassAtK(Metric):
    """Unbiased pass@k: the mean over prompts of `1 - C(n - c, k) / C(n, k)` for `c` correct of `n` completions.

    Chen et al., arXiv 2107.03374, equation 1: the chance that at least one of `k` draws without replacement is correct.
    Prompts with fewer than `k` completions are left out; `k` is at least 1.
    """

    full_state_update = False
    total: torch.Tensor
    prompts: torch.Tensor

    def __init__(self, k: int) -> None:
        # Every rank sees all prompts.
        super().__init__(sync_on_compute=False)
        self.k = k
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, correct: torch.Tensor) -> None:
        """Add one prompt; `correct` is bool `[n]`."""
        n, c = correct.numel(), int(correct.sum())
        if n >= self.k:
            self.total += 1 - math.comb(n - c, self.k) / math.comb(n, self.k)
            self.prompts += 1

    def compute(self) -> torch.Tensor:
        """Return a float32 scalar, NaN before the first prompt."""
        return (self.total / self.prompts).float() if self.prompts else torch.tensor(float("nan"))


class PromptMean(Metric):
    """Mean over prompts, summed in float64."""

    full_state_update = False
    total: torch.Tensor
    prompts: torch.Tensor

    def __init__(self) -> None:
        super().__init__(sync_on_compute=False)
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("prompts", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, value: float) -> None:
        """Add the value of one prompt."""
        self.total += value
        self.prompts += 1

    def compute(self) -> torch.Tensor:
        """Return a float32 scalar, NaN before the first prompt."""
        return (self.total / self.prompts).float() if self.prompts else torch.tensor(float("nan"))


def majority_at_k(correct: Sequence[bool], answers: Sequence[str | None], k: int) -> float:
    """Return maj@k: the chance that the most frequent answer among `k` of `n` completions is correct.

    The `k` are drawn without replacement, and answers with equally many votes win equally often, so that nothing is
    random. Correct completions agree however they are spelt; a completion without an answer does not vote.

    Args:
        correct: whether each of `n >= k` completions is correct.
        answers: the answer of each; None where it gives none.
        k: number of votes, at least 1.
    """
    right = sum(correct)
    wrong = Counter(answer for answer, is_right in zip(answers, correct, strict=True) if not is_right and answer)
    silent = len(correct) - right - wrong.total()
    chance = Fraction(0)
    for votes in range(1, min(right, k) + 1):
        # ways[drawn][ties]: ways to draw so many of the others, so many answers of which have as many votes.
        ways = {(drawn, 0): math.comb(silent, drawn) for drawn in range(k - votes + 1)}
        for count in wrong.values():
            more: dict[tuple[int, int], int] = defaultdict(int)
            for (drawn, ties), number in ways.items():
                for taken in range(min(count, votes, k - votes - drawn) + 1):
                    more[drawn + taken, ties + (taken == votes)] += number * math.comb(count, taken)
            ways = more
        wins = sum(Fraction(number, ties + 1) for (drawn, ties), number in ways.items() if drawn == k - votes)
        chance += math.comb(right, votes) * wins
    return float(chance / math.comb(len(correct), k))


class ValidationMetrics:
    """Accuracy, pass@k and maj@k by the correctness rewards, the mean of every reward, and mean completion length.

    Accuracy and the means of the rewards are means over prompts, next to the number of these prompts, so that
    accuracies by task add up: for rewards of 0 and 1 that each apply to prompts of their own, the sum of prompts times
    mean is that of all prompts. Every rank sees the groups of all (`RolloutPipeline`), so there is nothing to reduce.

    Args:
        ks: the k of pass@k and maj@k, none of them above `generations`.
        generations: completions per prompt, `n` of avg@n.
        rewards: names of the rewards.
        tags: columns whose values have an accuracy of their own.
    """

    def __init__(
        self, ks: Sequence[int], generations: int, rewards: Sequence[str] = (), tags: Sequence[str] = ()
    ) -> None:
        self._generations, self._rewards, self._tags = generations, tuple(rewards), tuple(tags)
        self._ks = tuple(ks)
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self.reward, self.length, self.unscored, self.failed = (MeanMetric(sync_on_compute=False) for _ in range(4))
        self.accuracy, self.prompts = PromptMean(), SumMetric(sync_on_compute=False)
        self.pass_at = {k: PassAtK(k) for k in self._ks}
        self.majority_at = {k: PromptMean() for k in self._ks if k > 1}
        self._by_reward = {name: PromptMean() for name in self._rewards}
        self._by_tag: dict[str, PromptMean] = {}
        self.measured = False
        """Whether there has been a batch."""

    def update(self, groups: Sequence[RolloutGroup], counts: Mapping[str, float] | None = None) -> None:
        """Add a batch.

        Args:
            groups: its groups.
            counts: those of its ledger, which know of the completions that are not in the groups.
        """
        self.measured = True
        if counts is not None and (completions := counts["rewards/completions"]):
            self.unscored.update(counts["rewards/unscored"] / completions, completions)
            self.failed.update(counts["rewards/failed"] / completions, completions)
        for group in groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.prompts.update(float(len(correct) > 0))
            self.reward.update(torch.from_numpy(group.rewards))
            self.length.update(torch.tensor([float(len(one.token_ids)) for one in group.completions]))
            for passed in self.pass_at.values():
                passed.update(correct)
            answers = group.extras.get(EXTRACTED_ANSWER)
            for k, majority in self.majority_at.items():
                if answers is not None and len(correct) >= k:
                    majority.update(majority_at_k(correct.tolist(), answers, k))
            if len(correct):
                accuracy = float(correct.double().mean())
                self.accuracy.update(accuracy)
                for tag in self._tags:
                    if value := tag_value(group.prompt.columns, tag):
                        self._by_tag.setdefault(f"{tag}={value}", PromptMean()).update(accuracy)
            for name, mean in self._by_reward.items():
                values = group.components[name][~np.isnan(group.components[name])]
                if len(values):
                    mean.update(float(values.mean(dtype=np.float64)))

    def named(self, stage: str) -> dict[str, float]:
        """Return the metrics by the names they are logged under, without those that apply to no prompt.

        `stage` is the prefix of the names, e.g. "val", "test" or "val/gsm8k".
        """
        means: dict[str, PromptMean | PassAtK] = {f"pass@{k}": one for k, one in self.pass_at.items()}
        means |= {f"maj@{k}": one for k, one in self.majority_at.items() if one.prompts}
        found: dict[str, Metric] = {"accuracy": self.accuracy, f"avg@{self._generations}": self.accuracy}
        found |= means
        found |= {
            "reward": self.reward,
            "completions/mean_length": self.length,
            "prompts": self.prompts,
            "unscored_fraction": self.unscored,
            "failed_fraction": self.failed,
        }
        values = {name: float(metric.compute()) for name, metric in found.items()}
        values |= {f"{name}_prompts": float(one.prompts) for name, one in means.items()}
        for name, mean in self._by_reward.items():
            if mean.prompts:
                values |= {
                    f"rewards/{name}/mean": float(mean.compute()),
                    f"rewards/{name}/prompts": float(mean.prompts),
                }
        for tag, mean in sorted(self._by_tag.items()):
            values |= {f"{tag}/accuracy": float(mean.compute()), f"{tag}/prompts": float(mean.prompts)}
        return {f"{stage}/{name}": value for name, value in values.items()}


def mean_over_sets(stage: str, sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics that all sets have, averaged over the sets; the numbers of prompts are added up.

    Args:
        stage: the prefix of the returned names, e.g. "val".
        sets: the metrics of each set by the prefix of their names, e.g. "val/gsm8k".
    """
    plain = [{name.removeprefix(f"{prefix}/"): value for name, value in one.items()} for prefix, one in sets.items()]
    shared = [name for name in plain[0] if all(name in one for one in plain)]
    found = {}
    for name in shared:
        total = sum(one[name] for one in plain)
        found[f"{stage}/{name}"] = total if name.endswith("prompts") else total / len(plain)
    return found
