"""Splits pools so that no validation question occurs in training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from datamodules.errors import UserError
from datamodules.mixture import Mixture
from datamodules.pool import PromptPool
from datamodules.prompts.reading import Questions
from datamodules.seeding import derive_seed
from datamodules.types import Prompt


def split_pool(pool: PromptPool, size: int, seed: int) -> tuple[PromptPool, PromptPool]:
    """Split a pool into training and validation prompts, `(train, val)`, each in the order of `pool`.

    The `size` prompts with the smallest hashes of (seed, id) are held out, so data added later replaces few of them.
    Prompts with the same question stay together, so the two pools share no question.

    Raises:
        UserError: not `0 < size < Q`, or the split would divide the prompts of one question.
    """
    if not 0 < size < len(pool):
        raise UserError(
            f"A validation split of {size} prompts was requested from a pool of {len(pool)}. "
            f"Set data.val_size to 1 to {len(pool) - 1}."
        )
    by_question: dict[str, list[int]] = defaultdict(list)
    for position, question in enumerate(pool.questions):
        by_question[question].append(position)
    ranks = [derive_seed(seed, "validation split", name) for name in pool.ids]
    held = np.zeros(len(pool), dtype=bool)
    left = size
    for members in sorted(by_question.values(), key=lambda members: min(ranks[position] for position in members)):
        if len(members) <= left:
            held[members] = True
            left -= len(members)
        if left == 0:
            break
    if left:
        raise UserError(
            f"A validation split of {size} prompts would divide the prompts of one question. Set data.val_size to "
            f"{size - left}."
        )
    return _without(pool, held), _only(pool, held)


def hold_out(train: PromptPool, *val: PromptPool) -> PromptPool:
    """Return `train` without the prompts whose question occurs in one of the pools of `val`.

    Raises:
        UserError: no prompt is left.
    """
    questions = {question for pool in val for question in pool.questions}
    held = np.fromiter((question in questions for question in train.questions), dtype=bool, count=len(train))
    if held.all():
        raise UserError(f"All {len(train)} training prompts are also validation prompts. Give other data or seeds.")
    return _without(train, held) if held.any() else train


def sample_pool(pool: PromptPool, size: int | None, what: str) -> PromptPool:
    """Return `size` prompts in the order of the pool: those with the smallest hashes of their ids and `what`."""
    if size is None or size >= len(pool):
        return pool
    ranks = [derive_seed(what, name) for name in pool.ids]
    return sub_pool(pool, np.sort(np.argsort(ranks, kind="stable")[:size]))


def sub_pool(pool: PromptPool, positions: np.ndarray) -> PromptPool:
    """Return the prompts at `positions`, in that order, as a separate pool."""
    questions: Sequence[str]
    if isinstance(pool.questions, Questions):
        questions = pool.questions.take(positions)
    else:
        questions = [pool.questions[position] for position in positions]
    ids = [pool.ids[position] for position in positions]
    digests = None if pool.digests is None else [pool.digests[position] for position in positions]

    def build(index: int) -> Prompt:
        return replace(pool[positions[index]], index=index)

    return PromptPool(build, ids, questions, digests=digests)


def _only(pool: PromptPool, mask: np.ndarray) -> PromptPool:
    """Return the prompts of a bool `[Q]` mask."""
    if isinstance(pool, Mixture):
        return Mixture({name: _only(pool.parts[name], part) for name, part in pool.by_part(mask).items()})
    return sub_pool(pool, np.flatnonzero(mask))


def _without(pool: PromptPool, held: np.ndarray) -> PromptPool:
    """Return the prompts that are not held out, with the number held out in the report."""
    if isinstance(pool, Mixture):
        return Mixture({name: _without(pool.parts[name], part) for name, part in pool.by_part(held).items()})
    rest = sub_pool(pool, np.flatnonzero(~held))
    if pool.report is not None:
        rest.report = replace(pool.report, kept=len(rest), held_out=pool.report.held_out + int(held.sum()))
    return rest
