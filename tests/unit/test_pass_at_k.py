"""pass@k against the enumeration of all draws."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from app.reporting.validation import PassAtK, majority_at_k


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (5, 3, 2), (6, 2, 4), (6, 5, 4), (3, 3, 3)])
def test_it_is_the_share_of_draws_with_a_correct_one(n, c, k):
    correct = torch.arange(n) < c
    draws = list(combinations(correct.tolist(), k))
    metric = PassAtK(k)
    metric.update(correct)
    assert metric.compute().item() == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-7)


def test_it_averages_over_prompts_and_leaves_out_short_groups():
    metric = PassAtK(2)
    metric.update(torch.tensor([True, False]))  # 1
    metric.update(torch.tensor([False, False, False]))  # 0
    metric.update(torch.tensor([True]))  # too few
    assert metric.compute().item() == pytest.approx(0.5)


def test_without_prompts_it_is_not_a_number():
    assert torch.isnan(PassAtK(1).compute())


@pytest.mark.parametrize(
    ("correct", "answers", "k", "expected"),
    [
        # Of four draws of three: one has two votes for b, two are ties of three answers, one has no right answer.
        ([True, False, False, False], ["a", "b", "b", "c"], 3, (1 / 3 + 1 / 3) / 4),
        ([True, False, False, False], ["a", "b", "b", "c"], 4, 0.0),
        ([True, True, False, False], ["1/2", "0.5", "b", "b"], 4, 0.5),
        ([True, False, False], ["a", None, None], 2, 2 / 3),
        ([False, False], [None, None], 1, 0.0),
        ([True, True, False], ["a", "a", "b"], 1, 2 / 3),
    ],
)
def test_majority_counts_the_draws_in_which_the_right_answer_has_most_votes(
    correct: list[bool], answers: list[str | None], k: int, expected: float
) -> None:
    assert majority_at_k(correct, answers, k) == pytest.approx(expected)
