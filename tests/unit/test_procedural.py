"""Generated pools are fixed by their seed and score with reasoning-gym's own scorers."""

from __future__ import annotations

import random

import pytest
import reasoning_gym

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.procedural import Procedural, ProceduralTask, generate
from tests.support.reading_helpers import character_tokenizer

TASKS = [
    ProceduralTask("chain_sum", 30, {"min_terms": 2, "max_terms": 2}),
    ProceduralTask("gcd", 10),
    ProceduralTask("chain_sum", 20, {"min_terms": 5, "max_terms": 6}),
    ProceduralTask("rush_hour", 2),
    ProceduralTask("word_ladder", 4),
]


def load(tasks: list[ProceduralTask], seed: int = 7, **options) -> PromptPool:
    return Procedural(tasks, **options).load(character_tokenizer(), seed)


@pytest.fixture(scope="module")
def pool() -> PromptPool:
    return load(TASKS)


def test_ids_and_order(pool: PromptPool) -> None:
    assert pool.report is not None
    assert pool.report.read == 66
    assert pool.report.kept + pool.report.duplicates == 66 == len(pool) + pool.report.duplicates
    assert [name for name in pool.ids if name.startswith("gcd-")][:2] == ["gcd-0", "gcd-1"]
    assert pool.ids[0] == "chain_sum-0"
    assert pool.ids[-1] == "word_ladder-3"
    assert "chain_sum.2-19" in pool.ids


def test_every_column_that_the_scorer_reads(pool: PromptPool) -> None:
    for prompt in pool:
        columns = prompt.columns
        if columns["answer"] is None:
            assert prompt.id.startswith("rush_hour")
            continue
        task = columns["metadata"]["source_dataset"]
        entry = {name: columns[name] for name in ("question", "answer", "metadata")}
        scorer = reasoning_gym.get_score_answer_fn(task)
        assert scorer(answer=columns["answer"], entry=entry) == 1.0
        assert scorer(answer="no such thing", entry=entry) < 0.5
        assert columns["solution"] == columns["ground_truth"] == columns["answer"]
        assert task == prompt.id.split("-")[0].split(".")[0]


def test_chain_sums_are_right(pool: PromptPool) -> None:
    for prompt in pool:
        if prompt.id.startswith("chain_sum"):
            numbers = prompt.question.split(": ")[1].removesuffix(" =").replace("- ", "-").replace("+ ", "+").split()
            assert sum(map(int, numbers)) == int(prompt.columns["answer"])
            assert (len(numbers) == 2) == prompt.id.startswith("chain_sum-")


def test_seed_fixes_the_pool_and_entries_are_independent(pool: PromptPool) -> None:
    random.seed(1)
    state = random.getstate()
    again = load([*TASKS[:4], ProceduralTask("word_ladder", 4), ProceduralTask("gcd", 3)])
    assert random.getstate() == state
    assert again.ids[: len(pool)] == pool.ids
    assert list(again.questions)[: len(pool)] == list(pool.questions)


def test_split_and_seed_change_the_problems(pool: PromptPool) -> None:
    long_sums = [ProceduralTask("chain_sum", 20, {"min_terms": 5, "max_terms": 6, "min_digits": 3})]
    trained = set(load(long_sums).questions)
    assert len(trained) == 20
    assert trained.isdisjoint(load(long_sums, split="val").questions)
    assert trained.isdisjoint(load(long_sums, seed=8).questions)


def test_a_problem_is_that_of_the_library() -> None:
    ((problem,),) = generate([ProceduralTask("gcd", 1)], [1234])
    assert problem == reasoning_gym.create_dataset("gcd", seed=1234, size=1)[0]


def test_repeated_problems_are_dropped() -> None:
    pool = load([ProceduralTask("chain_sum", 400, {"max_terms": 2, "max_digits": 1})])
    assert pool.report is not None
    assert len(pool) == len(set(pool.questions)) <= 200  # a - b and a + b of two digits
    assert pool.report.duplicates == 400 - len(pool)


@pytest.mark.parametrize(
    ("task", "match"),
    [
        (ProceduralTask("chain_sums"), "no task 'chain_sums': did you mean 'chain_sum'"),
        (ProceduralTask("chain_sum", 5, {"max_term": 3}), "no setting 'max_term': did you mean 'max_terms'"),
        (ProceduralTask("chain_sum", 5, {"min_terms": 9}), "max_terms must be >= min_terms"),
        (ProceduralTask("chain_sum", 0), "size is 0, but must be at least 1"),
        (ProceduralTask("chain_sum", 5, {"seed": 3}), "params has 'seed'"),
    ],
)
def test_wrong_tasks_say_why(task: ProceduralTask, match: str) -> None:
    with pytest.raises(UserError, match=match):
        load([task])
