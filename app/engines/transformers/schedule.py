"""Chooses the prompts that are prefilled together, and tracks the rows that are being decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class PromptRows:
    """One prompt and those of its samples (int64 indices of the completions, `b * G + g`) that are decoded together."""

    token_ids: tuple[int, ...]
    samples: np.ndarray


def prefill_queue(
    prompts: Sequence[tuple[int, ...]], num_generations: int, max_rows: int, begun: range | None = None
) -> deque[PromptRows]:
    """Queue all prompts, longest first: a prompt that joins later always fits, because it is never longer.

    Equal prompts are read as one.

    Args:
        prompts: `B` prompts.
        num_generations: `G`.
        max_rows: most samples of one entry of the queue.
        begun: those of each prompt's samples that are queued; None for all `G`.
    """
    samples: dict[tuple[int, ...], list[int]] = {}
    for b, prompt in enumerate(prompts):
        samples.setdefault(prompt, []).extend(b * num_generations + g for g in begun or range(num_generations))
    queue: deque[PromptRows] = deque()
    for prompt in sorted(samples, key=len, reverse=True):
        its = np.array(samples[prompt])
        queue.extend(PromptRows(prompt, its[g : g + max_rows]) for g in range(0, len(its), max_rows))
    return queue


def take_bucket(waiting: deque[PromptRows], free_rows: int, prefill_tokens: int) -> list[PromptRows]:
    """Remove the next prefill batch from `waiting`: prompts of similar length (at least half the longest one's).

    The batch is empty if the next prompt's samples do not fit in `free_rows`. A single prompt may exceed
    `prefill_tokens`.
    """
    bucket: list[PromptRows] = []
    longest = len(waiting[0].token_ids) if waiting else 0
    while waiting and len(waiting[0].samples) <= free_rows:
        full = (len(bucket) + 1) * longest > prefill_tokens or 2 * len(waiting[0].token_ids) < longest
        if bucket and full:
            break
        bucket.append(waiting.popleft())
        free_rows -= len(bucket[-1].samples)
    return bucket


class DecodingRows:
    """The samples that are being decoded.

    Attributes:
        sample: int64 `[n]`: index of each row's completion.
        age: int64 `[n]`: number of tokens drawn so far.
        token: int64 `[n]`: the last token, not yet in the cache.
        position: int64 `[n]`: position of that token in the whole sequence.
    """

    def __init__(self) -> None:
        self.sample = self.age = self.token = self.position = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sample)

    def add(self, sample: np.ndarray, lengths: np.ndarray) -> None:
        """Add rows whose prompts of `lengths` tokens are in the cache and whose first token is drawn next."""
        self.sample = np.concatenate([self.sample, sample])
        self.age = np.concatenate([self.age, np.zeros_like(sample)])
        self.token = np.concatenate([self.token, np.zeros_like(sample)])
        self.position = np.concatenate([self.position, lengths - 1])

    def advance(self, first: int, tokens: np.ndarray) -> None:
        """Record the tokens drawn for all rows from `first` to the last."""
        self.token[first:] = tokens
        self.age[first:] += 1
        self.position[first:] += 1

    def keep(self, order: np.ndarray) -> None:
        """Keep the rows `order`, in that order."""
        self.sample, self.age = self.sample[order], self.age[order]
        self.token, self.position = self.token[order], self.position[order]


def fill_holes(alive: np.ndarray) -> np.ndarray:
    """Return an order of the `alive` rows (bool `[n]`) that moves as few as possible: the last ones into the holes."""
    count = int(alive.sum())
    order = np.arange(count)
    order[~alive[:count]] = count + np.flatnonzero(alive[count:])
    return order
