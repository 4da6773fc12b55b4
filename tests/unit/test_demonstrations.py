"""Demonstrations: right without noise by reasoning-gym's own scorer, and wrong as often as they are meant to be."""

from __future__ import annotations

import operator
import re
from itertools import pairwise

import numpy as np
import pytest
import reasoning_gym
import torch
from reasoning_gym.arithmetic.leg_counting import ANIMALS

from datamodules.demonstrations import ANSWER_MARKER, DEMONSTRATORS, demonstrate
from datamodules.demonstrations.solutions import SLIPS, linear
from datamodules.demonstrations.supervised import IGNORED, Demonstrations, char_tokenizer
from datamodules.errors import UserError
from datamodules.procedural import ProceduralTask

PARAMS = {
    "chain_sum": {"min_terms": 2, "max_terms": 12, "min_digits": 1, "max_digits": 2},
    "complex_arithmetic": {"operations": ["+", "-", "*"], "operations_weights": [0.3, 0.3, 0.4]},
    "leg_counting": {"min_animals": 1, "max_animals": 6, "max_instances": 9},
    "simple_equations": {"min_terms": 2, "max_terms": 6, "max_value": 12, "operators_weights": [0.5, 0.5, 0.0]},
    "spell_backward": {"min_word_len": 3, "max_word_len": 10},
}
VALUE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}
MIX = [
    ProceduralTask("chain_sum", 20, {"min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 1}),
    ProceduralTask("spell_backward", 10),
]


def dataset(task: str, size: int = 200):
    return reasoning_gym.create_dataset(task, size=size, seed=11, **PARAMS[task])


def wrong_steps(task: str, metadata: dict, work: str) -> tuple[int, int]:
    """(wrong steps, steps), recomputed from the text alone: each step is judged by the operands that it wrote."""
    if task == "chain_sum":
        steps = re.findall(r"(?=(?:^|=)(-?\d+)([+-])(\d+)=(-?\d+))", work)
        return sum(int(a) + int(sign + b) != int(c) for a, sign, b, c in steps), len(steps)
    if task == "leg_counting":
        wrong, before = 0, 0
        for step in work.split(","):
            product, *results = step.split("=")
            count, legs = map(int, product.split("*"))
            right = int(results[0]) == count * legs and int(results[-1]) == before + int(results[0])
            wrong, before = wrong + (not right), int(results[-1])
        return wrong, work.count("*")
    if task in ("complex_arithmetic", "simple_equations"):
        steps = re.findall(r"(-?\d+)([-+*/])(-?\d+)=(-?\d+)", work)
        return sum(VALUE[sign](int(a), int(b)) != int(c) for a, sign, b, c in steps), len(steps)
    letters = work.split(",")
    return sum(a != b for a, b in zip(letters, reversed(metadata["word"]), strict=True)), len(letters)


@pytest.mark.parametrize("task", DEMONSTRATORS)
def test_without_noise_every_answer_scores_full_marks(task: str) -> None:
    data = dataset(task)
    for entry in data:
        solution = demonstrate(task, entry["metadata"], 0.0, np.random.default_rng(0))
        assert data.score_answer(solution.text.rpartition(ANSWER_MARKER)[2], entry) == 1.0, solution
        assert solution.slips == 0 == wrong_steps(task, entry["metadata"], solution.work)[0]


@pytest.mark.parametrize("task", DEMONSTRATORS)
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_steps_are_wrong_as_often_as_told(task: str, noise: float) -> None:
    rng, wrong, steps = np.random.default_rng(1), 0, 0
    for entry in dataset(task, 600):
        solution = demonstrate(task, entry["metadata"], noise, rng)
        found, of = wrong_steps(task, entry["metadata"], solution.work)
        assert found == solution.slips
        wrong, steps = wrong + found, steps + of
    assert abs(wrong / steps - noise) < 4 * np.sqrt(noise * (1 - noise) / steps)


def test_success_of_a_sum_is_the_convolution_of_its_slips() -> None:
    """Slips may cancel: the chance of a right answer is that of a zero sum of independent slips."""
    noise, terms, rounds = 0.3, 5, 4000
    one = {0: 1 - noise} | dict.fromkeys(SLIPS, noise / len(SLIPS))
    total = {0: 1.0}
    for _ in range(terms - 1):
        step: dict[int, float] = {}
        for value, p in total.items():
            for slip, q in one.items():
                step[value + slip] = step.get(value + slip, 0.0) + p * q
        total = step
    metadata = {"expression": "4 - 1 + 8 - 3 + 2"}
    rng = np.random.default_rng(2)
    right = np.mean([demonstrate("chain_sum", metadata, noise, rng).answer == "10" for _ in range(rounds)])
    assert abs(right - total[0]) < 4 * np.sqrt(total[0] * (1 - total[0]) / rounds)


def test_solutions_worked_by_hand() -> None:
    rng = np.random.default_rng(0)
    assert demonstrate("chain_sum", {"expression": "4 - 1 - 7"}, 0.0, rng).text == "4-1=3-7=-4#### -4"
    animals = {"cat": 3, "spider": 2}
    assert ANIMALS["cat"] == 4 and ANIMALS["spider"] == 8
    assert demonstrate("leg_counting", {"animals": animals}, 0.0, rng).text == "3*4=12,2*8=16=28#### 28"
    assert demonstrate("spell_backward", {"word": "sun"}, 0.0, rng).text == "n,u,s#### nus"
    equation = {"equation": "17 - 5*x = 2", "variable": "x"}
    assert demonstrate("simple_equations", equation, 0.0, rng).text == "2-17=-15,-15/-5=3#### 3"
    product = {"num1": (1.0, -2.0), "num2": (3.0, 4.0), "operation": "*"}
    assert (
        demonstrate("complex_arithmetic", product, 0.0, rng).text
        == "1*3=3,-2*4=-8,3--8=11,1*4=4,-2*3=-6,4+-6=-2#### 11-2i"
    )


@pytest.mark.parametrize(
    ("equation", "expected"),
    [
        ("-x + 4 = 1", (-1, 4, 1)),
        ("7*n = -21", (7, 0, -21)),
        ("3 - 12*x = 9", (-12, 3, 9)),
        ("x = 5", (1, 0, 5)),
    ],
)
def test_an_equation_is_read_term_by_term(equation: str, expected: tuple[int, int, int]) -> None:
    assert linear(equation, "n" if "n" in equation else "x") == expected


@pytest.mark.parametrize("equation", ["x*y + 1 = 2", "2.5*x = 5", "4 = 4"])
def test_what_is_not_linear_is_refused(equation: str) -> None:
    with pytest.raises(UserError, match="equation"):
        linear(equation, "x")


def test_a_division_is_not_demonstrated() -> None:
    metadata = {"num1": (1.0, 2.0), "num2": (1.0, 1.0), "operation": "/"}
    with pytest.raises(UserError, match="cannot demonstrate"):
        demonstrate("complex_arithmetic", metadata, 0.0, np.random.default_rng(0))


def test_tokenizer_gives_text_back_with_phrases_as_one_token() -> None:
    tokenizer = char_tokenizer(["Add up: ", "Add up"])
    ids = tokenizer("Add up: 1 + 2 =\nAdd upé")["input_ids"]
    assert len(ids) == 1 + len("1 + 2 =\n") + 1 + len("é".encode())
    assert tokenizer.decode(ids) == "Add up: 1 + 2 =\nAdd upé"
    assert tokenizer.decode([*ids[:2], tokenizer.eos_token_id], skip_special_tokens=True) == "Add up: 1"


def test_packed_rows_hold_every_demonstration_once_with_only_completions_learnt() -> None:
    data = Demonstrations(MIX, {"chain_sum": 0.2, "spell_backward": 0.0}, repeats=3, row_length=160, rows_per_batch=4)
    data.setup("fit")
    questions = [entry["question"] for task in data.entries("fit", [60, 30]) for entry in task]
    found = []
    for batch in data.train_dataloader():
        for ids, labels, positions in zip(batch.input_ids, batch.labels, batch.position_ids, strict=True):
            starts = [*torch.nonzero(positions == 0).flatten().tolist(), len(ids)]
            for start, stop in pairwise(starts):
                learnt = labels[start:stop] != IGNORED
                if not learnt.any():
                    assert set(ids[start:stop].tolist()) == {data.tokenizer.pad_token_id}
                    continue
                assert torch.equal(ids[start:stop][learnt], labels[start:stop][learnt])
                prompt = data.tokenizer.decode(ids[start:stop][~learnt])
                assert prompt.endswith("\n") and data.tokenizer.decode(labels[start:stop][learnt]).endswith("<eos>")
                found.append(prompt[:-1])
    assert sorted(found) == sorted(questions)


def test_bad_settings_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        Demonstrations([ProceduralTask("chain_sums", 5)], {"chain_sums": 0.1})
    with pytest.raises(UserError, match="probability"):
        Demonstrations([ProceduralTask("chain_sum", 5)], {"chain_sum": 1.5})


def test_the_clean_fraction_comes_first() -> None:
    """The first demonstrations add up; afterwards every step is wrong (noise 1)."""
    data = Demonstrations(MIX[:1], {"chain_sum": 1.0}, repeats=10, clean_fraction=0.5)
    data.setup("fit")
    verdicts = []
    for batch in data.train_dataloader():
        text = data.tokenizer.decode(batch.labels[batch.labels != IGNORED])
        for completion in text.split("<eos>")[:-1]:
            verdicts.append(wrong_steps("chain_sum", {}, completion.partition(ANSWER_MARKER)[0]))
    assert len(verdicts) == 200
    assert all(wrong == 0 for wrong, _ in verdicts[:100])
    assert all(wrong == steps for wrong, steps in verdicts[100:])
