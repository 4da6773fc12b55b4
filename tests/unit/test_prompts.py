"""Reading real files and every format, dropping what cannot be used, naming rows, splitting pools."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptFile
from datamodules.prompts.splits import hold_out, split_pool
from datamodules.seeding import derive_seed
from tests.support.reading_helpers import character_tokenizer, shared, write_jsonl

ROWS = [{"question": f"{a}+{a}?", "answer": str(2 * a)} for a in range(5)]


def load(path: str | Path, **options: Any) -> PromptPool:
    return PromptFile(str(path), **options).load(character_tokenizer(), 0)


def numbered(tmp_path: Path, numbers: Sequence[int], name: str = "n.jsonl") -> PromptPool:
    return load(write_jsonl(tmp_path / name, [{"id": f"n{n}", "question": f"what is {n}?"} for n in numbers]))


@pytest.mark.parametrize(("name", "first", "count"), [("gsm8k_train", "72", 7473), ("gsm8k_test", "18", 1319)])
def test_gsm8k(name: str, first: str, count: int) -> None:
    path = shared(f"{name}.jsonl")
    pool = load(path)
    assert len(pool) == len(set(pool.ids)) == count
    assert pool[0].columns["answer"] == first
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    assert list(pool.questions) == [row["question"] for row in rows]
    for position in range(0, count, 97):
        prompt, row = pool[position], rows[position]
        assert prompt.columns["answer"] == row["answer"].split("#### ")[1].replace(",", "")
        assert prompt.columns["rationale"] == row["answer"]
        assert len(prompt.token_ids) == 1 + len(row["question"].encode())  # <s> and one token per byte


def test_gsm8k_thousands() -> None:
    pool = load(shared("gsm8k_train.jsonl"))
    assert [pool[row].columns["answer"] for row in (345, 367, 462)] == ["1080", "850000", "2250"]


def test_math500() -> None:
    pool = load(shared("math500.jsonl"), id_column="unique_id")
    assert len(pool) == 500
    assert pool.ids[0] == "test/precalculus/807.json"
    assert pool[0].columns["answer"] == pool[0].columns["ground_truth"] == r"\left( 3, \frac{\pi}{2} \right)"
    assert pool[0].columns["solution"].startswith("We have that")
    assert pool[0].columns["level"] == 2


def test_verl_parquet() -> None:
    pool = load(shared("dsr1209_verl.parquet"))
    assert pool.report is not None
    # 1209 rows: two questions stand in it twice, and row 265 has no ground truth.
    assert (pool.report.read, pool.report.kept, pool.report.duplicates, pool.report.empty) == (1209, 1206, 2, 1)
    assert pool.ids[:3] == ["0", "1", "2"]
    assert "265" not in pool.ids
    assert [pool[row].columns["answer"] for row in range(3)] == [r"\frac{3}{7}", "124", "432"]
    assert pool[1].columns["data_source"] == "deepscaler"
    assert pool[1].prompt[0]["role"] == "user"
    assert pool.questions[1].startswith("The lock opens only if")


def test_traces() -> None:
    pool = load(shared("dsr1209_pass_rates.jsonl"), id_column="idx")
    assert len(pool) == 1206
    assert pool[1].id == "1"
    assert pool[1].columns["pass_rate_by_epoch"][:3] == [0.625, 0.5, 0.375]
    assert pool[2].columns["solution"] == "432"


@pytest.mark.parametrize("kind", ["jsonl", "json", "json_lines", "parquet", "csv", "saved", "saved_splits", "folder"])
def test_every_format_reads_the_same(tmp_path: Path, kind: str) -> None:
    data = datasets.Dataset.from_list(ROWS)
    path = tmp_path / ("data" if kind in ("saved", "saved_splits", "folder") else f"data.{kind.split('_')[0]}")
    if kind in ("jsonl", "json_lines"):
        write_jsonl(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    elif kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(ROWS)
    elif kind == "saved":
        data.save_to_disk(str(path))
    elif kind == "saved_splits":
        datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(path))
    else:
        path.mkdir()
        write_jsonl(path / "train.jsonl", ROWS)
    pool = load(path)
    read = [(prompt.index, prompt.question, prompt.columns["answer"]) for prompt in pool]
    assert read == [(place, row["question"], row["answer"]) for place, row in enumerate(ROWS)]


def test_answers_keep_their_spelling(tmp_path: Path) -> None:
    spelt = ["007", "1.50", "NA", "1e5", "True", "2024-01-01"]
    rows = [{"question": f"q{place}", "answer": text} for place, text in enumerate(spelt)]
    path = tmp_path / "data.csv"
    path.write_text("question,answer\n" + "".join(f"{row['question']},{row['answer']}\n" for row in rows))
    assert [prompt.columns["answer"] for prompt in load(path)] == spelt
    dates = write_jsonl(tmp_path / "dates.jsonl", [{"question": "when?", "answer": "2024-01-01"}])
    assert load(dates)[0].columns["answer"] == "2024-01-01"


def test_mixed_types_are_read(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "data.jsonl", [{"question": "a", "answer": 1}, {"question": "b", "answer": "x"}, {"question": "c"}]
    )
    pool = load(path)
    assert [prompt.columns["answer"] for prompt in pool] == [1, "x"]
    assert pool.report is not None
    assert pool.report.empty == 1


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = [
        {"question": "12345", "answer": "1"},
        {"question": "12345", "answer": "1"},  # the same again
        {"question": "12345", "answer": "2"},  # another answer: another prompt
        {"question": "  ", "answer": "1"},
        {"question": "1234", "answer": None},
        {"question": "123456", "answer": "1"},  # <s> and six bytes
        {"question": "last", "answer": "1"},
    ]
    path = write_jsonl(tmp_path / "data.jsonl", rows)
    pool = load(path, max_prompt_length=6)
    assert [(prompt.question, prompt.columns["answer"]) for prompt in pool] == [
        ("12345", "1"),
        ("12345", "2"),
        ("last", "1"),
    ]
    assert str(pool.report) == (
        f"{path} (question -> answer): 7 rows read, 3 prompts kept, "
        "dropped 2 empty, 1 duplicate, 1 longer than 6 tokens, 1 with several different answers (all kept)"
    )
    assert len(set(pool.ids)) == 3
    assert [prompt.id for prompt in pool] == pool.ids
    assert len(load(path, limit=3)) == 2
    with pytest.raises(UserError, match=r"No prompt is left: .* 4 longer than 1 tokens"):
        load(path, max_prompt_length=1)


def test_rows_without_answers_are_told_apart_by_their_other_columns(tmp_path: Path) -> None:
    rows = [
        {"prompt": "f", "tests": ["f(1)"], "extra_info": {"index": 0, "kind": "a"}},
        {"prompt": "f", "tests": ["f(2)"], "extra_info": {"index": 1, "kind": "a"}},
        {"prompt": "f", "tests": ["f(2)"], "extra_info": {"index": 2, "kind": "a"}},  # the second under another id
        {"prompt": "f", "tests": ["f(2)"], "extra_info": {"index": 3, "kind": "b"}},
    ]
    for answer in ("auto", None):
        pool = load(write_jsonl(tmp_path / "data.jsonl", rows), answer_column=answer)
        kept = [(prompt.columns["tests"], prompt.columns["extra_info"]["kind"]) for prompt in pool]
        assert kept == [(["f(1)"], "a"), (["f(2)"], "a"), (["f(2)"], "b")]
        hint = "; if one of tests, extra_info holds the answers, set answer_column to it" if answer else ""
        assert str(pool.report).endswith(f"4 rows read, 3 prompts kept, dropped 1 duplicate{hint}")


def test_ids_depend_on_the_question_alone(tmp_path: Path) -> None:
    first = load(write_jsonl(tmp_path / "a.jsonl", ROWS))
    turned = load(write_jsonl(tmp_path / "b.jsonl", ROWS[::-1]), template="Q: {question}")
    assert first.ids == turned.ids[::-1]
    assert len(set(first.ids)) == len(ROWS)
    assert list(first.positions(turned.ids)) == [4, 3, 2, 1, 0]


def test_repeated_index_gets_a_suffix_and_repeated_id_is_no_id(tmp_path: Path) -> None:
    verl = [
        {"prompt": f"p{n}", "reward_model": {"ground_truth": "1"}, "extra_info": {"index": n % 2}} for n in range(4)
    ]
    ids = load(write_jsonl(tmp_path / "verl.jsonl", verl)).ids
    assert ids[:2] == ["0", "1"]
    assert re.fullmatch("0-[0-9a-f]{8}", ids[2])
    assert re.fullmatch("1-[0-9a-f]{8}", ids[3])
    assert load(write_jsonl(tmp_path / "two.jsonl", verl[:3])).ids == ids[:3]
    grouped = [{"id": "same", **row} for row in ROWS]
    plain = load(write_jsonl(tmp_path / "plain.jsonl", ROWS))
    assert all(re.fullmatch("[0-9a-f]{16}", name) for name in plain.ids)
    assert load(write_jsonl(tmp_path / "grouped.jsonl", grouped)).ids == plain.ids


def test_broken_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a"}\n\n{"question": "b", \n{"question": "c"}\n')
    with pytest.raises(UserError, match=r"data.jsonl' line 3: .*\. Write one JSON object per line"):
        load(path)
    path.write_text('{"question": "a"}\n[1, 2]\n')
    with pytest.raises(UserError, match=r"data.jsonl' line 2: .* is not an object"):
        load(path)
    array = tmp_path / "data.json"
    array.write_text('[{"question": "a"},\n{"question": }]')
    with pytest.raises(UserError, match=r"data.json' line 2: "):
        load(array)


def test_missing_things_are_named_with_what_is_near(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(UserError, match=r"trian.jsonl' does not exist: .*did you mean 'train.jsonl'"):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match=r"does not exist: in .*choose one of 'train.jsonl'"):
        load(tmp_path / "nowhere" / "x.parquet")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match=r"empty.jsonl' is empty"):
        load(tmp_path / "empty.jsonl")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match=r"ends in '.txt', expected one of .jsonl"):
        load(tmp_path / "notes.txt")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match=r"no split 'trian': did you mean 'train'"):
        load(tmp_path / "saved", split="trian")
    with pytest.raises(UserError, match=r"limit is 0\. Set at least 1"):
        PromptFile("x", limit=0)


def test_a_sample_is_the_same_for_every_seed_and_is_spread_over_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "data.jsonl", [{"question": f"q{i}", "answer": "1"} for i in range(200)])
    pool = load(path, sample_size=40)
    assert str(pool.report) == f"{path} (question -> answer): 200 rows read, 40 prompts kept"
    places = [int(prompt.question[1:]) for prompt in pool]
    assert places == sorted(set(places))
    assert len(places) == 40
    assert 3 < sum(place < 40 for place in places) < 18  # hypergeometric: 8 with a standard deviation of 2.3
    again = PromptFile(str(path), sample_size=40).load(character_tokenizer(), seed=11)
    assert again.ids == pool.ids
    assert pool[7].index == 7
    assert load(path, sample_size=500).ids == load(path).ids


def test_split_is_disjoint_ordered_and_stable(tmp_path: Path) -> None:
    pool = numbered(tmp_path, range(200))
    train, val = split_pool(pool, 40, seed=3)
    assert (len(train), len(val)) == (160, 40)
    assert set(train.ids) | set(val.ids) == set(pool.ids)
    assert set(train.questions).isdisjoint(val.questions)
    assert val.ids == [name for name in pool.ids if name in set(val.ids)]
    assert [prompt.index for prompt in val] == list(range(40))
    assert [prompt.question for prompt in val] == list(val.questions)
    assert val[7].id == val.ids[7]
    ranks = {name: derive_seed(3, "validation split", name) for name in pool.ids}
    assert set(val.ids) == set(sorted(ranks, key=ranks.__getitem__)[:40])
    assert split_pool(pool, 40, seed=3)[1].ids == val.ids
    assert split_pool(pool, 40, seed=4)[1].ids != val.ids
    assert train.report is not None
    assert (train.report.kept, train.report.held_out) == (160, 40)
    # 20 more prompts can push out only those that rank after them: at most 20, about 40 * 20 / 220 of them.
    larger = split_pool(numbered(tmp_path, range(220), "more.jsonl"), 40, seed=3)[1]
    assert len(set(val.ids) - set(larger.ids)) <= 12


def test_split_keeps_a_question_on_one_side(tmp_path: Path) -> None:
    rows = [{"question": f"q{n // 2}", "answer": str(n)} for n in range(40)]
    pool = load(write_jsonl(tmp_path / "pairs.jsonl", rows))
    for seed in range(5):
        train, val = split_pool(pool, 10, seed)
        assert len(val) == 10
        assert set(train.questions).isdisjoint(val.questions)
    with pytest.raises(UserError, match=r"would divide the prompts of one question\. Set data\.val_size to 10"):
        split_pool(pool, 11, 0)
    with pytest.raises(
        UserError, match=r"split of 40 prompts was requested from a pool of 40\. Set data\.val_size to 1 to 39"
    ):
        split_pool(pool, 40, 0)


def test_hold_out_removes_validation_questions(tmp_path: Path) -> None:
    train = hold_out(numbered(tmp_path, range(10)), numbered(tmp_path, [3, 8, 77], "val.jsonl"))
    assert train.ids == ["n0", "n1", "n2", "n4", "n5", "n6", "n7", "n9"]
    assert train[3].id == "n4"
    assert train[3].index == 3
    assert train.report is not None
    assert train.report.held_out == 2
