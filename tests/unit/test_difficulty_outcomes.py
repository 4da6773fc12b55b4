"""Recorded outcomes counted by hand, and splits that keep tested questions out of training."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.reporting.completions import rows_of
from datamodules.difficulty.outcomes import RecordedOutcomes, question_key, read_outcomes, split_questions
from datamodules.errors import UserError
from tests.support.builders import group, prompt
from tests.support.fuzzing import examples


def write_step(folder, step, groups):
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist(list(rows_of(groups, step, [], [], {}, str))), folder / f"step_{step:08d}.parquet"
    )


def test_a_run_counts_each_group_once_at_its_birth(tmp_path):
    """Read back what `CompletionsLog` writes."""
    completions = tmp_path / "completions"
    first, second, third = (prompt(index) for index in range(3))
    fresh = [group(first, [1, 0, 0, 0], birth=0), group(second, [1, 1, 0, 0], birth=0)]
    write_step(completions, 0, fresh)
    replayed = group(first, [1, 0, 0, 0], birth=0, source="replay")
    write_step(completions, 10, [replayed, group(first, [1, 1, 1, 0], birth=10), group(third, [0, 0], birth=10)])
    outcomes = read_outcomes(tmp_path, smallest_visit=1)
    assert list(outcomes.questions) == ["question 0", "question 1", "question 2"]
    np.testing.assert_array_equal(outcomes.rates, np.array([[0.25, 0.75], [0.5, np.nan], [np.nan, 0.0]]))
    one_file = read_outcomes(completions / "step_00000010.parquet", smallest_visit=1)
    np.testing.assert_array_equal(one_file.rates, np.array([[0.25, 0.75], [np.nan, 0.0]]))


def test_short_visits_are_pooled(tmp_path):
    path = tmp_path / "rates.jsonl"
    rates = [[0.0, 0.5, 1.0, None, 0.25], [None, 1.0, None, 0.5, None], [1.0, None, None, None, None]]
    path.write_text(
        "".join(json.dumps({"question": f"q{i}", "pass_rate_by_epoch": row}) + "\n" for i, row in enumerate(rates))
    )
    pooled = read_outcomes(path, smallest_visit=2)
    # Visit 0 has two questions, visit 1 two; 2 and 3 have one each and go together; 4 joins them.
    expected = np.array([[0.0, 0.5, 0.625], [np.nan, 1.0, 0.5], [1.0, np.nan, np.nan]])
    np.testing.assert_array_equal(pooled.rates, expected)


def test_published_layouts_by_hand(tmp_path):
    """Big-Math, Skywork-OR1, lm-eval-harness's samples and a plain rate, side by side as four records."""
    rows = {
        "bigmath": [
            {"problem": "a", "answer": "1", "llama8b_solve_rate": 0.25},
            {"problem": "b", "answer": "2", "llama8b_solve_rate": None},
        ],
        "skywork": [
            {"prompt": [{"role": "user", "content": text}], "extra_info": {"model_difficulty": wrong}}
            for text, wrong in (("a", {"1.5B": 12, "7B": 4}), ("c", {"1.5B": 16, "7B": 0}))
        ],
        "harness": [
            {"doc_id": 0, "doc": {"question": "b"}, "filter": "strict", "metrics": ["exact_match"], "exact_match": 0.0},
            {"doc_id": 0, "doc": {"question": "b"}, "filter": "loose", "metrics": ["exact_match"], "exact_match": 1.0},
            {"doc_id": 1, "doc": {"problem": "a"}, "acc": 1, "acc_norm": 0},
        ],
        "plain": [{"question": "d", "pass_rate": 0.5}],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(pa.Table.from_pylist(rows["skywork"]), tmp_path / "skywork.parquet")
    nan = np.nan
    expected = [[0.25, 0.25, 0.75, 0.0, nan], [nan, 0.0, 1.0, nan, nan], [nan, nan, nan, 0.5, nan], [nan] * 4 + [0.5]]
    for ending in ("jsonl", "parquet"):
        names = ("bigmath.jsonl", f"skywork.{ending}", "harness.jsonl", "plain.jsonl")
        found = read_outcomes(*(tmp_path / name for name in names), smallest_visit=1)
        assert found.questions == ["a", "c", "b", "d"]
        np.testing.assert_array_equal(found.rates, np.array(expected, dtype=np.float32))
    (tmp_path / "odd.jsonl").write_text('{"problem": "a", "level": 3}\n')
    with pytest.raises(UserError, match=r"line 1 has the columns problem, level, none .*Expected .*llama8b_solve_rate"):
        read_outcomes(tmp_path / "odd.jsonl")


def test_a_question_that_stands_twice_is_one(tmp_path):
    path = tmp_path / "rates.jsonl"
    lines = [
        {"question": "how  many?", "pass_rate_by_epoch": [0.5]},
        {"question": "how many?\n", "pass_rate_by_epoch": [1, 0]},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    outcomes = read_outcomes(path, smallest_visit=1)
    assert outcomes.questions == ["how  many?"]
    np.testing.assert_array_equal(outcomes.rates, [[0.75, 0.0]])


def test_means_do_not_reward_being_tried_late():
    rates = np.array([[0.2, np.nan], [0.4, 0.6], [np.nan, 0.8]], dtype=np.float32)
    # Levels 0.3 and 0.7; centred -0.1, (0.1, -0.1) and 0.1; back on the scale by their mean 0.5.
    np.testing.assert_allclose(RecordedOutcomes(["a", "b", "c"], rates).means, [0.4, 0.5, 0.6], atol=1e-7)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: Expecting property name"),
        ("[1]", r"line 2: '\[1\]' is not an object"),
        (
            '{"question": "a", "pass_rates": [1]}',
            "line 2 has the columns question, pass_rates, none .*did you mean 'pass_rates'",
        ),
        ('{"question": "a", "pass_rate_by_epoch": [1.5]}', "line 2 holds .*expected"),
        ('{"question": "a", "pass_rate_by_epoch": 1}', "line 2 holds .*expected"),
        ('{"question": 3, "pass_rate_by_epoch": [1]}', "line 2 holds .*expected"),
    ],
)
def test_malformed_lines_are_user_errors(tmp_path, line, said):
    path = tmp_path / "rates.jsonl"
    path.write_text('{"question": "b", "pass_rate_by_epoch": [1, null]}\n' + line + "\n")
    with pytest.raises(UserError, match=said):
        read_outcomes(path)


def test_a_line_ends_where_json_lines_says(tmp_path):
    path = tmp_path / "rates.jsonl"
    # U+2028 and U+0085 separate lines for Python's str, and are plain characters within a JSON string.
    path.write_text('{"question": "a\u2028b\u0085c", "pass_rate_by_epoch": [0.5]}\n', encoding="utf-8")
    assert read_outcomes(path, smallest_visit=1).questions == ["a\u2028b\u0085c"]


def test_useless_paths_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .*No such file"):
        read_outcomes(tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match="holds no completions"):
        read_outcomes(tmp_path)
    (tmp_path / "rates.jsonl").write_text("\n")
    with pytest.raises(UserError, match="records no outcome"):
        read_outcomes(tmp_path / "rates.jsonl")
    with pytest.raises(UserError, match="is not recorded outcomes"):
        read_outcomes(tmp_path / "rates.csv")


WORDS = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6)


@settings(max_examples=examples(60), deadline=None)
@given(
    texts=st.lists(WORDS, min_size=30, max_size=120),
    spaces=st.lists(st.sampled_from([" ", "  ", "\n", "\t "]), min_size=1, max_size=5),
    seed=st.integers(0, 5),
)
def test_no_question_is_on_two_sides(texts, spaces, seed):
    questions = [spaces[i % len(spaces)].join(words) for i, words in enumerate(texts)]
    distinct = len({question_key(question) for question in questions})
    if distinct < 10:
        return
    tested: list[str] = []
    for fold in range(5):
        split = split_questions(questions, seed, 0.1, 0.2, fold)
        parts = [{question_key(questions[row]) for row in rows} for rows in (split.train, split.validation, split.test)]
        assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]
        rows = np.concatenate([split.train, split.validation, split.test])
        np.testing.assert_array_equal(np.sort(rows), np.arange(len(questions)))
        tested.extend(parts[2])
        again = split_questions(questions[::-1], seed, 0.1, 0.2, fold)
        assert {question_key(questions[::-1][row]) for row in again.test} == parts[2]
    # Five folds of a fifth test every question once.
    assert len(tested) == len(set(tested)) == distinct


def test_too_few_questions_are_a_user_error():
    with pytest.raises(UserError, match="cannot be split"):
        split_questions(["a", "b", "c"], 0)
    with pytest.raises(UserError, match="of fold 6"):
        split_questions([f"q{i}" for i in range(50)], 0, fold=5)
