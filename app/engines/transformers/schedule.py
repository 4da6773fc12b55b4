"""Which prompts are prefilled together, and which samples are being decoded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Work:
    """One prompt and those of its samples that are decoded together.

    Attributes:
        token_ids: of the prompt.
        samples: int64: numbers of the completions, `b * G + g`.
    """

    token_ids: tuple[int, ...]
    samples: np.ndarray


def plan(prompts: Sequence[tuple[int, ...]], num_generations: int, max_rows: int) -> deque[Work]:
    """All work, longest prompt first: what joins later is never longer than what is there, so it always fits."""
    work = []
    for b in sorted(range(len(prompts)), key=lambda b: -len(prompts[b])):
        for g in range(0, num_generations, max_rows):
            samples = np.arange(g, min(g + max_rows, num_generations)) + b * num_generations
            work.append(Work(prompts[b], samples))
    return deque(work)


def take_bucket(waiting: deque[Work], free_rows: int, prefill_tokens: int) -> list[Work]:
    """Takes from `waiting` what to prefill next: of similar length (none under half of the longest), within limits.

    Empty when the next prompt's samples do not fit in `free_rows`. A single prompt may exceed `prefill_tokens`.
    """
    bucket: list[Work] = []
    longest = len(waiting[0].token_ids) if waiting else 0
    while waiting and len(waiting[0].samples) <= free_rows:
        full = (len(bucket) + 1) * longest > prefill_tokens or 2 * len(waiting[0].token_ids) < longest
        if bucket and full:
            break
        bucket.append(waiting.popleft())
        free_rows -= len(bucket[-1].samples)
    return bucket


class Rows:
    """The samples being decoded.

    Attributes:
        sample: int64 `[n]`: number of each row's completion.
        age: int64 `[n]`: tokens drawn so far.
        token: int64 `[n]`: the last one, not yet in the cache.
        position: int64 `[n]`: its position in the whole sequence.
    """

    def __init__(self) -> None:
        self.sample = self.age = self.token = self.position = np.zeros(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.sample)

    def add(self, sample: np.ndarray, lengths: np.ndarray) -> None:
        """Rows whose prompts of `lengths` tokens are in the cache and whose first token is to be drawn."""
        self.sample = np.concatenate([self.sample, sample])
        self.age = np.concatenate([self.age, np.zeros_like(sample)])
        self.token = np.concatenate([self.token, np.zeros_like(sample)])
        self.position = np.concatenate([self.position, lengths - 1])

    def advance(self, first: int, tokens: np.ndarray) -> None:
        """Notes the tokens drawn for the rows from `first` on."""
        self.token[first:] = tokens
        self.age[first:] += 1
        self.position[first:] += 1

    def keep(self, order: np.ndarray) -> None:
        self.sample, self.age = self.sample[order], self.age[order]
        self.token, self.position = self.token[order], self.position[order]


def fill_holes(alive: np.ndarray) -> np.ndarray:
    """Order of the `alive` rows (bool `[n]`) that moves as few as possible: the last ones into the holes."""
    count = int(alive.sum())
    order = np.arange(count)
    order[~alive[:count]] = count + np.flatnonzero(alive[count:])
    return order
