"""Answers of which all are wanted, in any order, as OlympiadBench has them: a list of one text with commas."""

import pytest

from app.rewards import Math
from datamodules.answers import extract


@pytest.mark.parametrize(
    ("held", "right", "wrong"),
    [
        (["1,3,5"], (r"\boxed{5, 1, 3}", r"\boxed{\{3, 5, 1\}}"), (r"\boxed{3}", r"\boxed{1, 4, 3}")),
        (["$-2$,$0$,$2$"], (r"\boxed{0, 2, -2}", r"\boxed{2}, \boxed{-2} and \boxed{0}"), (r"\boxed{0}",)),
        (["$(1,2)$,$(2,1)$"], (r"\boxed{(2,1), (1,2)}",), (r"\boxed{(1,2)}", r"\boxed{(1,2), (1,2)}", r"\boxed{1,2}")),
        (["$\\frac{32}{9}$,$\\frac{1}{2}$"], (r"\boxed{0.5, \frac{32}{9}}",), (r"\boxed{\frac{32}{9}}",)),
        (["-2,-2"], (r"\boxed{-2, -2}",), (r"\boxed{-2, 2}",)),
        (["$3$", "$4$"], (r"\boxed{4, 3}",), (r"\boxed{3}", r"\boxed{4}")),
        # A single answer is as ever: a tuple has an order, a fraction need not be in a list.
        (["$(2,4)$"], (r"\boxed{(2,4)}",), (r"\boxed{(4,2)}",)),
        (["$\\frac{1}{2}$"], (r"\boxed{0.5}",), (r"\boxed{2}",)),
        ("7", (r"\boxed{7}",), (r"\boxed{8}",)),
    ],
)  # fmt: skip
def test_all_answers_are_wanted_in_any_order(held: object, right: tuple[str, ...], wrong: tuple[str, ...]) -> None:
    math = Math()
    gold = extract(held, "set")
    scores = math(prompts=[""] * 9, completions=[*right, *wrong], completion_ids=[], answer=[gold] * len(right + wrong))
    assert list(scores) == [1.0] * len(right) + [0.0] * len(wrong)


@pytest.mark.parametrize("held", [None, [], [""], ["$$"], " "])
def test_no_answer_is_none(held: object) -> None:
    assert extract(held, "set") is None
