"""Splits of recorded questions, so that what a predictor is tested on it has never read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.difficulty.outcomes import question_key
from datamodules.errors import UserError
from datamodules.seeding import derive_seed


@dataclass(frozen=True, slots=True, eq=False)
class QuestionSplit:
    """Rows (int64, ascending) of the questions to train on, to stop early by, and to test on."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_questions(
    questions: Sequence[str], seed: int, validation: float = 0.1, test: float = 0.2, fold: int = 0
) -> QuestionSplit:
    """Deals questions out in an order that hashes of seed and text give.

    The order does not depend on the order or number of rows. The test part of fold `k` is the k-th slice of it, so the
    slices of folds `0 .. floor(1 / test) - 1` do not overlap; validation is the slice that follows, around the end.

    Args:
        questions: `Q` texts; texts that differ only in spacing go to the same part.
        seed: another seed, another order.
        validation: share of the distinct questions.
        test: share of the distinct questions.
        fold: which slice is tested.

    Raises:
        UserError: a part would be empty.
    """
    keys = [question_key(question) for question in questions]
    order = sorted(set(keys), key=lambda key: (derive_seed(seed, "question split", key), key))
    count = len(order)
    first, last = round(count * fold * test), round(count * (fold + 1) * test)
    held = round(count * validation)
    if first == last or held == 0 or last > count or last - first + held >= count:
        raise UserError(
            f"{count} questions cannot be split into {validation:.0%} for validation and {test:.0%} for test of fold "
            f"{fold + 1}: expected each part to get one; record more questions or change the shares"
        )
    place = {key: (number - first) % count for number, key in enumerate(order)}
    places = np.array([place[key] for key in keys])
    tested = last - first
    return QuestionSplit(
        train=np.flatnonzero(places >= tested + held),
        validation=np.flatnonzero((places >= tested) & (places < tested + held)),
        test=np.flatnonzero(places < tested),
    )
