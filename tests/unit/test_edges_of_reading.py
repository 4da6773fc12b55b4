"""Borders of reading prompts that no larger test notices."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptFile
from datamodules.prompts.files import open_table
from datamodules.prompts.readers import FileOptions
from datamodules.prompts.splits import split_pool
from datamodules.prompts.subset import write_subset
from datamodules.prompts.tables import DatasetTable
from datamodules.prompts.templates import Renderer
from tests.support.reading_helpers import character_tokenizer, write_jsonl


def load(path: Path, **options: object) -> PromptPool:
    return PromptFile(str(path), **options).load(character_tokenizer(), seed=0)  # type: ignore[arg-type]


def test_text_that_is_not_utf8_in_parquet_is_named_before_its_row_is_drawn(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32).tobytes())
    notes = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xe9")])
    pq.write_table(pa.table({"question": ["1+1", "1+2"], "answer": ["2", "3"], "note": notes}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet' cannot be read as parquet: .*UTF8"):
        load(tmp_path / "a.parquet")


def test_a_limit_counts_the_tokens_that_the_tokenizer_adds() -> None:
    renderer = Renderer(character_tokenizer())  # `<s>` and one token per byte
    texts = ["abc", "abcd", "é", "éa", "éé", "a" * 5000]
    assert renderer.fit(texts, 4) == [True, False, True, True, False, False]
    assert Renderer(character_tokenizer(begins=False)).fit(texts, 4) == [True, True, True, True, True, False]


def test_names_nearby_are_listed_up_to_twenty(tmp_path: Path) -> None:
    for place in range(20):
        (tmp_path / f"{place:02}.jsonl").touch()
    for count, told in ((20, False), (21, True)):
        with pytest.raises(UserError, match="does not exist") as error:
            load(tmp_path / "quite another name")
        assert str(error.value).count(".jsonl") == 20, count
        assert (" and 1 more" in str(error.value)) is told
        assert " and 0 more" not in str(error.value)
        (tmp_path / "20.jsonl").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' has no data file \(.*\.jsonl"):
        load(tmp_path / "empty" / "a.jsonl")


def test_a_linked_folder_is_part_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    write_jsonl(tmp_path / "far" / "train.jsonl", [{"question": "1+1", "answer": "2"}])
    (tmp_path / "near").mkdir()
    os.symlink(tmp_path / "far", tmp_path / "near" / "data")
    assert list(load(tmp_path / "near").questions) == ["1+1"]


@pytest.mark.parametrize("positions", [[0, 2, 1, 3], [3, 1], [1, 2, 3], [2], [], [1, 1], [0, 2]])
def test_rows_come_in_the_order_asked_for(positions: list[int]) -> None:
    table = DatasetTable(datasets.Dataset.from_dict({"n": list(range(5))}))
    assert [row["n"] for row in table.rows(positions)] == positions


def test_json_columns_join_the_other_columns() -> None:
    features = datasets.Features({"n": datasets.Value("int64"), "entry": datasets.Json()})
    rows = {"n": [1, 2], "entry": [{"a": 0.1}, None]}
    table = DatasetTable(datasets.Dataset.from_dict(rows, features=features))
    assert table.rows([0, 1]) == [{"n": 1, "entry": {"a": 0.1}}, {"n": 2, "entry": None}]


def test_one_prompt_may_be_held_out(tmp_path: Path) -> None:
    pool = load(write_jsonl(tmp_path / "a.jsonl", [{"question": str(n), "answer": "1"} for n in range(3)]))
    assert [len(part) for part in split_pool(pool, 1, seed=0)] == [2, 1]
    with pytest.raises(UserError, match="to 1 to 2"):
        split_pool(pool, 0, seed=0)


def test_both_spellings_of_truth_in_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,lower,upper,mixed\na,true,True,true\nb,false,False,maybe\n")
    rows = open_table(str(tmp_path / "a.csv"), None, "train", FileOptions()).rows([0, 1])
    assert [[row[name] for name in ("lower", "upper", "mixed")] for row in rows] == [
        [True, True, "true"],
        [False, False, "maybe"],
    ]


@pytest.mark.parametrize("template", ["no field", "{}{question}", "{question"])
def test_a_wrong_template_is_refused_before_any_data_are_read(template: str) -> None:
    with pytest.raises(UserError, match="template"):
        PromptFile("missing.jsonl", template=template)


def test_the_first_rows_are_those_of_the_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": str(n), "answer": "1"} for n in range(5)])
    assert list(load(path, limit=2).questions) == ["0", "1"]
    assert list(load(path, limit=9).questions) == ["0", "1", "2", "3", "4"]


def test_a_column_that_arrow_would_change_is_json_text_and_text_stays_text(tmp_path: Path) -> None:
    entries: list[object] = [{"a": 1}, "plain", None]
    write = [{"question": str(n), "answer": "1", "entry": entry} for n, entry in enumerate(entries)]
    pool = load(write_jsonl(tmp_path / "a.jsonl", write))
    write_subset(list(pool), tmp_path / "b.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["entry"] for row in rows] == ['{"a": 1}', "plain", None]
