"""Validation prompts that no training prompt repeats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.reading import Questions
from datamodules.seeding import derive_seed
from datamodules.types import Prompt


def split_pool(pool: PromptPool, size: int, seed: int) -> tuple[PromptPool, PromptPool]:
    """Splits into training and validation prompts, `(train, val)`, each in the order of `pool`.

    The `size` prompts with the smallest hashes of (seed, id) are held out: data added later replaces few of them.
    Prompts of the same question stay together, so the two pools share no text.

    Raises UserError unless `0 < size < Q` and the questions can be divided so.
    """
    if not 0 < size < len(pool):
        raise UserError(f"a validation split of {size} prompts asked of {len(pool)}: expected 1 to {len(pool) - 1}")
    held = np.zeros(len(pool), dtype=bool)
    left = size
    for members in _groups_by_hash(pool, seed):
        if len(members) <= left:
            held[members] = True
            left -= len(members)
        if left == 0:
            break
    if left:
        raise UserError(
            f"a validation split of {size} prompts would divide the prompts of one question: try {size - left}"
        )
    return _held_out(pool, held), sub_pool(pool, np.flatnonzero(held))


def hold_out(train: PromptPool, val: PromptPool) -> PromptPool:
    """`train` without the prompts whose question is in `val`. Raises UserError when nothing remains."""
    questions = set(val.questions)
    held = np.fromiter((question in questions for question in train.questions), dtype=bool, count=len(train))
    if held.all():
        raise UserError(f"all {len(train)} training prompts are validation prompts as well: give other data or seed")
    return _held_out(train, held) if held.any() else train


def sub_pool(pool: PromptPool, positions: np.ndarray) -> PromptPool:
    """The prompts at `positions`, in that order, as a pool of their own."""
    questions: Sequence[str]
    if isinstance(pool.questions, Questions):
        questions = pool.questions.take(positions)
    else:
        questions = [pool.questions[position] for position in positions]
    ids = [pool.ids[position] for position in positions]
    digests = None if pool.digests is None else [pool.digests[position] for position in positions]
    return PromptPool(_SubRows(pool, positions), ids, questions, digests=digests)


class _SubRows:
    """Some of a pool's prompts, numbered anew."""

    def __init__(self, pool: PromptPool, positions: np.ndarray) -> None:
        self._pool = pool
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Prompt:
        index = range(len(self))[index]
        return replace(self._pool[self._positions[index]], index=index)


def _held_out(pool: PromptPool, held: np.ndarray) -> PromptPool:
    rest = sub_pool(pool, np.flatnonzero(~held))
    if pool.report is not None:
        rest.report = replace(pool.report, kept=len(rest), held_out=pool.report.held_out + int(held.sum()))
    return rest


def _groups_by_hash(pool: PromptPool, seed: int) -> Iterator[list[int]]:
    """Positions of the prompts of each question, by the smallest hash among their ids."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(pool.questions):
        groups[question].append(position)
    ranks = [derive_seed(seed, "validation split", name) for name in pool.ids]
    yield from sorted(groups.values(), key=lambda members: min(ranks[position] for position in members))
