"""pass@k and maj@k against the enumeration of all draws, intervals against a loop, and the table of both."""

from __future__ import annotations

import math
from itertools import combinations

import pytest

from app.reporting.bootstrap import DRAWS, bootstrap_means, interval
from app.reporting.results_table import results_table
from app.reporting.validation import ValidationMetrics, intervals_over_prompts, majority_at_k, pass_at_k
from datamodules.seeding import generator
from tests.support.builders import group, prompt


@pytest.mark.parametrize(("n", "c", "k"), [(4, 0, 2), (4, 1, 2), (5, 3, 2), (6, 2, 4), (6, 5, 4), (3, 3, 3)])
def test_it_is_the_share_of_draws_with_a_correct_one(n: int, c: int, k: int) -> None:
    draws = list(combinations([place < c for place in range(n)], k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws), abs=1e-12)


def test_it_averages_over_prompts_and_leaves_out_short_groups() -> None:
    metrics = ValidationMetrics([2], generations=3)
    assert math.isnan(metrics.pass_at[2].compute())
    # pass@2 of the second group is 1, of the third 2/3, and the first has too few completions.
    metrics.update([group(prompt(place), one) for place, one in enumerate(([1.0], [1.0, 0.0], [1.0, 0.0, 0.0]))])
    found = metrics.named("val")
    assert found["val/pass@2"] == pytest.approx((1 + 2 / 3) / 2)
    assert found["val/pass@2_prompts"] == 2
    assert found["val/avg@3"] == found["val/accuracy"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_intervals_are_those_of_a_loop_over_the_same_draws() -> None:
    rewards = {"val/a": [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], "val/b": [[1.0, 1.0], [0.0, 1.0]]}
    sets = {}
    for name, groups in rewards.items():
        sets[name] = ValidationMetrics([2], generations=2)
        sets[name].update([group(prompt(place), one) for place, one in enumerate(groups)])
    found = intervals_over_prompts("val", sets, seed=5)
    means: dict[str, list[float]] = {"a": [], "b": []}
    for name, accuracies in (("a", [0.5, 0.0, 1.0]), ("b", [1.0, 0.5])):
        drawn = generator(5, "bootstrap", f"val/{name}").integers(len(accuracies), size=(DRAWS, len(accuracies)))
        for row in drawn.tolist():
            means[name].append(sum(accuracies[place] for place in row) / len(row))
    means[""] = [(one + other) / 2 for one, other in zip(means["a"], means["b"], strict=True)]
    for name, values in means.items():
        ordered = sorted(values)
        # The middle 95%: a value of each tail lies on the bound, for the means have few different values.
        low, high = ordered[round(0.025 * (DRAWS - 1))], ordered[round(0.975 * (DRAWS - 1))]
        prefix = f"val/{name}".rstrip("/")
        assert found[f"{prefix}/accuracy"] == found[f"{prefix}/avg@2"] == pytest.approx([low, high])
    assert found["val/b/pass@2"] == [1.0, 1.0]  # both prompts have a right completion
    assert found == intervals_over_prompts("val", sets, seed=5)
    assert "val/maj@2" not in found  # no reward gave the answers


def test_a_long_set_is_drawn_in_parts_and_its_interval_is_that_of_the_normal_distribution() -> None:
    values = [1.0] * 300 + [0.0] * 700
    low, high = interval(bootstrap_means(values, 1, "any"))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.002)
    assert len(bootstrap_means(values, 1, "any")) == DRAWS


def test_table_shows_percent_with_intervals_and_the_mean() -> None:
    metrics = {"test/a/accuracy": 0.5, "test/a/avg@4": 0.5, "test/a/pass@4": 0.75, "test/a/prompts": 2.0,
               "test/b/accuracy": 1.0, "test/b/avg@1": 1.0, "test/b/pass@1": 1.0, "test/b/prompts": 1.0,
               "test/accuracy": 0.75, "test/prompts": 3.0}  # fmt: skip
    intervals = {"test/a/accuracy": [0.25, 0.625], "test/accuracy": [0.5, 1.0]}
    assert results_table("test", ["test/a", "test/b"], metrics, intervals).splitlines()[:5] == [
        "| set | prompts | n | avg@n | pass@1 | pass@4 |",
        "|---|---:|---:|---:|---:|---:|",
        "| a | 2 | 4 | 50.0 [25.0, 62.5] |  | 75.0 |",
        "| b | 1 | 1 | 100.0 | 100.0 |  |",
        "| mean | 3 |  | 75.0 [50.0, 100.0] |  |  |",
    ]


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
