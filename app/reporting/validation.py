"""Validation metrics: accuracy, pass@k, maj@k, reward and completion length over the prompts of a set."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
import torch
from torchmetrics import MeanMetric, Metric, SumMetric

from app.reporting.bootstrap import bootstrap_means, interval
from app.rewards.base import EXTRACTED_ANSWER
from datamodules.types import RolloutGroup
from datamodules.validation import tag_value

CORRECT = 0.5
"""A completion counts as correct when its correctness reward is above this."""


CONVERSATION_COUNTS = (
    "environment/conversations", "environment/turns", "environment/failed", "tools/calls", "tools/failed_calls",
)  # fmt: skip
"""Names of the counts of conversations with an environment in a ledger."""


def conversation_metrics(counts: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of conversations with an environment by name, given `CONVERSATION_COUNTS`; none of none."""
    conversations, turns, failed, calls, failed_calls = (counts.get(name, 0.0) for name in CONVERSATION_COUNTS)
    if not conversations:
        return {}
    return {
        "environment/turns": turns / conversations,
        "environment/failed": failed,
        "tools/call_frequency": calls / conversations,
        "tools/failure_frequency": failed_calls / max(1.0, calls),
    }


class PromptMean:
    """Mean over prompts, summed in float64, with the values that it is the mean of."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._total = 0.0

    @property
    def prompts(self) -> int:
        return len(self.values)

    def update(self, value: float) -> None:
        """Add the value of one prompt."""
        self.values.append(value)
        self._total += value

    def compute(self) -> torch.Tensor:
        """Return a float32 scalar, NaN before the first prompt."""
        return torch.tensor(self._total / self.prompts if self.prompts else math.nan)


def pass_at_k(completions: int, right: int, k: int) -> float:
    """Return pass@k without bias: the chance that at least one of `k` draws without replacement is right.

    It is `1 - C(n - c, k) / C(n, k)` for `c` right of `n` completions (Chen et al., arXiv 2107.03374, equation 1).

    Args:
        completions: number of completions, at least `k`.
        right: how many of them are right.
        k: number of draws, at least 1.
    """
    return 1 - math.comb(completions - right, k) / math.comb(completions, k)


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
        self.pass_at = {k: PromptMean() for k in self._ks}
        self.majority_at = {k: PromptMean() for k in self._ks if k > 1}
        self._by_reward = {name: PromptMean() for name in self._rewards}
        self._by_tag: dict[str, PromptMean] = {}
        self._conversations = dict.fromkeys(CONVERSATION_COUNTS, 0.0)
        self.measured = False
        """Whether there has been a batch."""

    def update(self, groups: Sequence[RolloutGroup], counts: Mapping[str, float] | None = None) -> None:
        """Add a batch.

        Args:
            groups: its groups.
            counts: those of its ledger, which know of the completions that are not in the groups.
        """
        self.measured = True
        if counts is not None:
            for name in CONVERSATION_COUNTS:
                self._conversations[name] += counts.get(name, 0.0)
            if completions := counts["rewards/completions"]:
                self.unscored.update(counts["rewards/unscored"] / completions, completions)
                self.failed.update(counts["rewards/failed"] / completions, completions)
        for group in groups:
            correct = torch.from_numpy(group.correctness) > CORRECT
            self.prompts.update(float(len(correct) > 0))
            self.reward.update(torch.from_numpy(group.rewards))
            self.length.update(torch.tensor([float(one.generated_tokens) for one in group.completions]))
            for k, passed in self.pass_at.items():
                if len(correct) >= k:
                    passed.update(pass_at_k(len(correct), int(correct.sum()), k))
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
        means = self._at_k()
        found: dict[str, Metric | PromptMean] = {"accuracy": self.accuracy, f"avg@{self._generations}": self.accuracy}
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
        values |= conversation_metrics(self._conversations)
        return {f"{stage}/{name}": value for name, value in values.items()}

    def bootstrap(self, *context: str | int) -> dict[str, np.ndarray]:
        """Return the means of `bootstrap_means`, of accuracy, pass@k and maj@k by their names.

        Prompts are drawn alike for all metrics that are about all prompts. `context` is what the seed is derived from.
        """
        means = {"accuracy": self.accuracy, f"avg@{self._generations}": self.accuracy} | self._at_k()
        return {name: bootstrap_means(one.values, *context) for name, one in means.items() if one.prompts}

    def _at_k(self) -> dict[str, PromptMean]:
        means = {f"pass@{k}": one for k, one in self.pass_at.items()}
        return means | {f"maj@{k}": one for k, one in self.majority_at.items() if one.prompts}


def mean_over_sets(stage: str, sets: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the metrics that all sets have, averaged over the sets; numbers of prompts and failures are added up.

    Args:
        stage: the prefix of the returned names, e.g. "val".
        sets: the metrics of each set by the prefix of their names, e.g. "val/gsm8k".
    """
    plain = [{name.removeprefix(f"{prefix}/"): value for name, value in one.items()} for prefix, one in sets.items()]
    shared = [name for name in plain[0] if all(name in one for one in plain)]
    found = {}
    for name in shared:
        total = sum(one[name] for one in plain)
        found[f"{stage}/{name}"] = total if name.endswith(("prompts", "environment/failed")) else total / len(plain)
    return found


def intervals_over_prompts(stage: str, sets: Mapping[str, ValidationMetrics], seed: int) -> dict[str, list[float]]:
    """Return 95% intervals, [low, high], by bootstrap over prompts, of accuracy, pass@k and maj@k.

    For the mean over sets, prompts are drawn within each set.

    Args:
        stage: the prefix of the names of the mean over sets, e.g. "test"; with this name a set is the only one.
        sets: the metrics of each set by the prefix of their names, e.g. "test/gsm8k".
        seed: the seed from which that of each set is derived.
    """
    draws = {prefix: metrics.bootstrap(seed, "bootstrap", prefix) for prefix, metrics in sets.items()}
    if draws and stage not in draws:
        shared = [name for name in next(iter(draws.values())) if all(name in one for one in draws.values())]
        draws[stage] = {name: np.mean([one[name] for one in draws.values()], axis=0) for name in shared}
    return {f"{prefix}/{name}": interval(means) for prefix, one in draws.items() for name, means in one.items()}
