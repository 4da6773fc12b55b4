"""Schemas are detected from their columns, and answers become the text that a reward compares with."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest

from datamodules.answers import accepted, boxed_answer, gsm8k_answer, last_boxes
from datamodules.errors import UserError
from datamodules.prompts.detection import SchemaOverrides, detect
from datamodules.prompts.file import PromptFile
from tests.support.reading_helpers import character_tokenizer, shared, write_jsonl

USER = [{"role": "user", "content": "2+3?"}]
SHOWN = [*USER, {"role": "assistant", "content": "It is 5."}]


@pytest.mark.parametrize(
    ("row", "prompt", "answer", "identity"),
    [
        ({"prompt": "2+3?", "solution": "$5$"}, "2+3?", "$5$", None),
        ({"prompt": USER, "solution": r"so \boxed{5}"}, USER, "5", None),
        (
            {"data_source": "d", "prompt": USER, "reward_model": {"ground_truth": "5"}, "extra_info": {"index": 41}},
            USER,
            "5",
            "41",
        ),
        ({"data_source": "d", "prompt": USER, "reward_spec": {"ground_truth": "5", "method": "rule"}}, USER, "5", None),
        ({"input": "2+3?", "label": 5}, "2+3?", 5, None),
        ({"input": USER, "label": "5"}, USER, "5", None),
        ({"messages": SHOWN, "ground_truth": ["5"], "dataset": "gsm8k"}, USER, ["5"], None),
        ({"input": "2+3?", "output": "5"}, "2+3?", "5", None),
        ({"question": "2+3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}, "2+3?", "5", None),
        ({"question": "2+3?", "answer": "1,5"}, "2+3?", "1,5", None),
        ({"problem": "2+3?", "answer": "5", "solution": r"\boxed{7}"}, "2+3?", "5", None),
        ({"problem": "2+3?", "solution": r"not \boxed{4} but $\boxed{5}$"}, "2+3?", "5", None),
        (
            {"conversations": [{"from": "human", "value": "2+3?"}, {"from": "gpt", "value": "It."}], "answer": "5"},
            USER,
            "5",
            None,
        ),
        ({"messages": [*SHOWN, *SHOWN[1:]], "ground_truth": "5"}, USER, "5", None),
        ({"messages": [*SHOWN, *SHOWN, *SHOWN[1:] * 2], "ground_truth": "5"}, [*SHOWN, *USER], "5", None),
        ({"query": "2+3?", "response": "5"}, "2+3?", "5", None),
        ({"problem": "2+3?", "generated_solution": "so 6", "expected_answer": "5"}, "2+3?", "5", None),
        ({"id": "sum-1", "question": "2+3?", "answer": "5"}, "2+3?", "5", "sum-1"),
    ],
)
def test_schemas_are_detected_from_their_columns(tmp_path: Path, row, prompt, answer, identity) -> None:
    pool = PromptFile(write_jsonl(tmp_path / "data.jsonl", [row])).load(character_tokenizer(), 0)
    read = pool[0]
    assert read.prompt == prompt
    assert read.question == "2+3?" == pool.questions[0]
    assert read.columns["answer"] == answer
    if identity is not None:
        assert read.id == identity
    for name in ("solution", "ground_truth"):
        assert read.columns[name] == row.get(name, answer)
    for name in set(row) - {"prompt", "messages", "conversations", "input", "problem", "query", "answer"}:
        assert read.columns[name] == row[name]


def test_worked_solution_moves_to_rationale(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": "how many?", "answer": "a lot\n#### 70,000"}])
    columns = PromptFile(path).load(character_tokenizer(), 0)[0].columns
    assert columns == {
        "answer": "70000",
        "solution": "70000",
        "ground_truth": "70000",
        "rationale": "a lot\n#### 70,000",
        "question": "how many?",
    }


def test_overrides_beat_detection(tmp_path: Path) -> None:
    row = {"prompt": "no", "meta": {"q": "2+3?", "key": "x7"}, "answer": "no", "gold": r"thus \boxed{5}"}
    path = write_jsonl(tmp_path / "data.jsonl", [row])
    source = PromptFile(path, prompt_column="meta.q", answer_column="gold", answer_format="boxed", id_column="meta.key")
    read = source.load(character_tokenizer(), 0)[0]
    assert (read.prompt, read.id) == ("2+3?", "x7")
    assert (read.columns["answer"], read.columns["solution"]) == ("no", "5")  # `answer` is the data's own column


def test_columns_without_a_prompt_are_named() -> None:
    with pytest.raises(
        UserError, match=r"columns are 'text', 'label'; expected one of 'prompt', 'messages', 'conversations', 'instr"
    ):
        detect(["text", "label"], [{"text": "a", "label": "b"}], SchemaOverrides(), "data.csv")
    with pytest.raises(UserError, match=r"data.csv has no column 'quesion': did you mean 'question'"):
        detect(["question", "answer"], [], SchemaOverrides(prompt_column="quesion"), "data.csv")


def test_unusable_prompts_are_named_by_row(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": USER}, {"prompt": [{"speaker": "human", "text": "hi"}]}])
    with pytest.raises(UserError, match=r"row 2: a list holds .*, not messages with 'role' and 'content'"):
        PromptFile(path).load(character_tokenizer(), 0)


def test_reward_arguments_are_not_passed_twice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"prompt": "a", "completions": "b", "level": 3}])
    pool = PromptFile(path).load(character_tokenizer(), 0)
    assert dict(pool[0].columns) == {"level": 3, "question": "a"}
    assert "not passed to rewards: completions" in str(pool.report)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{\frac{3}{7}}", r"\frac{3}{7}"),
        (r"\boxed{1} then \boxed{ 2 }", "2"),
        (r"\boxed{4} then cut \boxed{\frac{1", "4"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} end}", r"\left\{ x \right."),
        (r"\fbox{6}", "6"),
        (r"\fboxed{6}", "6"),
        (r"$\boxed 9$.", "9"),
        ("nothing", None),
    ],
)
def test_last_balanced_box(text: str, expected: str | None) -> None:
    assert boxed_answer(text) == expected


def test_gsm8k_answer_is_the_last_line() -> None:
    assert gsm8k_answer("x\n#### 1,234,567\n") == "1234567"
    assert gsm8k_answer("####-5") == "-5"
    assert gsm8k_answer("#### heading\nmore text") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"The roots are $\boxed{2}$ and $\boxed{3}$.", ["2", "3"]),
        (r"$x=\boxed{2}$ or $x = \boxed{3}$", ["2", "3"]),
        (r"\boxed{2}, \boxed{3}, and \fbox{4}", ["2", "3", "4"]),
        (r"The first root is \boxed{2}, and the second is \boxed{3}.", ["2", "3"]),
        (r"\boxed{2} \text{ and } \boxed{3}", ["2", "3"]),
        (r"not \boxed{4} but $\boxed{5}$", ["5"]),
        (r"first \boxed{4}. Hence \boxed{5}", ["5"]),
        ("\\boxed{4}\n\n\\boxed{5}", ["5"]),
        (r"\boxed{4} and \boxed{4}", ["4"]),
        (r"\boxed{x = \boxed{4}}", ["4"]),
        (r"\boxed{4} and \boxed{", ["4"]),
        (r"\boxed{}", [""]),
        (r"\boxed{4} or \boxed{}", [""]),
    ],
)
def test_boxes_that_are_one_answer_belong_together(text: str, expected: list[str]) -> None:
    assert last_boxes(text) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (72, ["72"]),
        (72.0, ["72.0", "72"]),
        (0.00005, ["0.00005"]),
        (2.5e22, ["25000000000000000000000"]),
        (123456789012345678901234567890, ["123456789012345678901234567890"]),
        (True, ["true"]),
        ({"a": [1, None]}, ['{"a": [1, null]}']),
        (["72"], ["72"]),
        (["a", None, 7], ["a", "7"]),
        (np.array(["6", "7"]), ["6", "7"]),
        ("3 * 6 = 18\n#### 1,234,567", ["1234567"]),
        ("#### 3,5", ["3,5"]),
        ("#### 1, 2, 3", ["1, 2, 3"]),
        ("#### 12,34", ["12,34"]),
        ("#### $1,018.50", ["$1018.50"]),
        (r"so $\fbox{42}$", ["42"]),
        (r"$\boxed{2}$ and $\boxed{3}$", [r"\boxed{2}, \boxed{3}"]),
        (r"$\boxed{\$7}$", [r"\$7"]),
        ("  ", []),
        (None, []),
    ],
)
def test_table_of_forms(value: object, expected: list[str]) -> None:
    assert accepted(value) == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["0.00005", "2.5e22", "1.6e-19"], [0.00005, 2.5e22, 1.6e-19]),
        (["1", "2.5", "1.6e-19", "0.12345678901234568"], [1, 2.5, 1.6e-19, 0.12345678901234568]),
        (["123456789012345678901234567890", "2.5"], [123456789012345678901234567890, 2.5]),
        (["true", "false"], [True, False]),
        (['{"a": 1}', '{"a": 2.5}'], [{"a": 1}, {"a": 2.5}]),
        (["[1, 2.5]", "[3]"], [[1, 2.5], [3]]),
        (["7", '"seven"'], [7, "seven"]),
        (["0", '"0"'], [0, "0"]),
    ],
)
def test_answers_reach_rewards_as_they_are_in_the_file(tmp_path: Path, written: list[str], expected: list) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f'{{"question": "q{i}", "answer": {text}}}\n' for i, text in enumerate(written)))
    found = [prompt.columns["answer"] for prompt in PromptFile(str(path)).load(character_tokenizer(), 0)]
    assert found == expected
    assert list(map(type, found)) == list(map(type, expected))


def test_rows_without_an_answer_are_kept_where_none_is_needed(tmp_path: Path) -> None:
    rows = [{"question": f"write f{i}", "answer": "", "tests": f"assert f{i}()"} for i in range(3)]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    pool = PromptFile(path, answer_column=None).load(character_tokenizer(), 0)
    assert [prompt.columns["tests"] for prompt in pool] == [row["tests"] for row in rows]
    with pytest.raises(UserError, match="3 empty"):
        PromptFile(path).load(character_tokenizer(), 0)


def test_boxed_answers_of_math500_are_its_answer_column() -> None:
    """The answers of MATH-500 were taken out of its solutions by its makers: an independent extraction."""
    rows = [json.loads(line) for line in Path(shared("math500.jsonl")).read_text().splitlines()]
    different = [boxed_answer(row["solution"]) for row in rows if boxed_answer(row["solution"]) != row["answer"]]
    assert len(rows) == 500
    assert different == [r"\boxed{15\frac{39}{40}}, \boxed{\frac{639}{40}}"]  # one value, written twice


@pytest.mark.parametrize(
    ("rows", "prompts", "schema"),
    [
        (  # Alpaca
            [
                {"instruction": "Add them.", "input": "2 and 3", "output": "5"},
                {"instruction": "Name a prime.", "input": "", "output": "7"},
            ],
            ["Add them.\n\n2 and 3", "Name a prime."],
            "instruction + input -> output",
        ),
        (  # Dolly
            [
                {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "closed_qa"},
                {"instruction": "Why?", "context": None, "response": "so", "category": "open_qa"},
            ],
            ["Who?\n\nAnn came.", "Why?"],
            "instruction + context -> response",
        ),
        (  # SQuAD, whose answers are objects
            [{"context": "Ann came.", "question": "Who?", "answers": {"text": ["Ann"]}}],
            ["Ann came.\n\nWho?"],
            "context + question, no answers",
        ),
        (
            [{"instruction": "Answer in French.", "question": "Who?", "answer": "Anne"}],
            ["Answer in French.\n\nWho?"],
            "instruction + question -> answer",
        ),
        ([{"instruction": "Who?", "output": "Ann"}], ["Who?"], "instruction -> output"),
        (  # HotpotQA: paragraphs are no text
            [{"context": {"title": ["Ann"]}, "question": "Who?", "answer": "Ann"}],
            ["Who?"],
            "question -> answer; not shown to the policy: context",
        ),
        (
            [{"prompt": "Who?", "question": "Who came?", "input": "Ann", "answer": "Ann"}],
            ["Who?"],
            "prompt -> answer; not shown to the policy: input, question",
        ),
        (
            [{"problem": "Who?", "query": "Who came?", "answer": "Ann"}],
            ["Who?"],
            "problem -> answer; not shown to the policy: query",
        ),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_all_parts_of_a_prompt_are_shown_or_named(
    tmp_path: Path, rows: list[dict], prompts: list[str], schema: str, ending: str
) -> None:
    path = tmp_path / f"data.{ending}"
    if ending == "jsonl":
        write_jsonl(path, rows)
    elif ending == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    elif any(isinstance(value, dict) for row in rows for value in row.values()):
        return
    else:
        datasets.Dataset.from_list(rows).to_csv(str(path))
    pool = PromptFile(str(path)).load(character_tokenizer(), 0)
    assert [prompt.question for prompt in pool] == list(pool.questions) == prompts
    assert str(pool.report).startswith(f"{path} ({schema}): {len(rows)} rows read, {len(rows)} prompts kept")


def test_a_named_prompt_column_is_the_whole_prompt(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"instruction": "Add.", "input": "2 and 3", "output": "5"}])
    pool = PromptFile(path, prompt_column="input").load(character_tokenizer(), 0)
    assert (pool[0].question, pool[0].columns["instruction"]) == ("2 and 3", "Add.")
    assert "(input -> output)" in str(pool.report)
