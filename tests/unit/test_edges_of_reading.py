"""Borders of reading prompts that no larger test notices."""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import signal
from pathlib import Path
from threading import Thread

import datasets
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.bounded import bounded
from datamodules.prompts.file import PromptFile
from datamodules.prompts.files import open_table
from datamodules.prompts.readers import FileOptions
from datamodules.prompts.reading import reward_columns
from datamodules.prompts.splits import hold_out, split_pool
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


def test_a_template_has_ten_seconds_and_four_gib_in_the_main_thread() -> None:
    def limits() -> object:
        return resource.getrlimit(resource.RLIMIT_AS), signal.getsignal(signal.SIGVTALRM)

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # whatever a test before this one has left
    before, elsewhere = limits(), []
    with bounded() as start:
        start()
        left = resource.getrlimit(resource.RLIMIT_AS)[0] - psutil.Process().memory_info().vms
        assert signal.getitimer(signal.ITIMER_VIRTUAL)[0] == pytest.approx(10, abs=0.1)
    assert left == pytest.approx(4 * 2**30, abs=2**26)
    assert (limits(), signal.getitimer(signal.ITIMER_VIRTUAL)) == (before, (0, 0))

    def body() -> None:
        with bounded() as start:
            start()
            elsewhere.append(limits())

    thread = Thread(target=body)
    thread.start()
    thread.join()
    assert elsewhere == [before]
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_named_columns_of_csv_keep_their_spelling(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("task,final,level,mark\na,1.50,1.50,1.0\nb,2.00,2.00,2.0\n")
    pool = load(tmp_path / "a.csv", prompt_column="task", answer_column="final", id_column="mark")
    assert [prompt.columns["final"] for prompt in pool] == ["1.50", "2.00"]
    assert [prompt.columns["level"] for prompt in pool] == [1.5, 2.0]
    assert pool.ids == ["1.0", "2.0"]


def test_a_subset_makes_its_folders_and_replaces_an_older_one(tmp_path: Path) -> None:
    pool = load(write_jsonl(tmp_path / "a.jsonl", [{"question": str(n), "answer": "1"} for n in range(3)]))
    path = tmp_path / "new" / "folder" / "b.jsonl"
    for size in (3, 2):
        write_subset(list(pool)[:size], path)
        assert len(path.read_text().splitlines()) == size
    assert [one.name for one in path.parent.iterdir()] == ["b.jsonl"]


def test_ids_are_hashes_that_never_change(tmp_path: Path) -> None:
    rows = [
        {"prompt": "é" + "x" * 9, "extra_info": {"index": index}, "answer": str(n)} for n, index in enumerate((7, 7))
    ]
    pool = load(write_jsonl(tmp_path / "a.jsonl", rows))
    # The lengths are those of the texts; the answer is JSON.
    both = hashlib.blake2b('10:éxxxxxxxxx3:"1"'.encode(), digest_size=16).hexdigest()
    assert pool.ids == ["7", f"7-{both[:8]}"]
    (alone,) = load(write_jsonl(tmp_path / "b.jsonl", [{"prompt": "xyz", "answer": "1"}])).ids
    assert alone == hashlib.blake2b(b"3:xyz", digest_size=16).hexdigest()[:16]


def test_columns_for_rewards_come_from_any_pool(tmp_path: Path) -> None:
    rows = [{"question": str(n), "answer": f"so\n#### {n}", "info": {"level": n}, "other": 1} for n in range(3)]
    pool = load(write_jsonl(tmp_path / "a.jsonl", rows))
    for one in (pool, PromptPool.of(list(pool))):
        found = list(reward_columns(one, ["info.level"]))
        assert [(row["answer"], row["info"]) for row in found] == [(str(n), {"level": n}) for n in range(3)]


def test_a_held_out_question_leaves_the_other_prompts_and_is_counted(tmp_path: Path) -> None:
    train = load(write_jsonl(tmp_path / "a.jsonl", [{"question": str(n), "answer": "1"} for n in range(4)]))
    val = load(write_jsonl(tmp_path / "b.jsonl", [{"question": q, "answer": "9"} for q in ("1", "x", "3")]))
    rest = hold_out(train, val)
    assert list(rest.questions) == ["0", "2"]
    assert rest.report is not None
    assert (rest.report.kept, rest.report.held_out) == (2, 2)
    assert hold_out(rest, val) is rest
    with pytest.raises(UserError, match="All 4 training prompts"):
        hold_out(train, train)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"weight": -0.5}, {"weight": 0.0}),
        ({"weight": math.inf}, {"weight": 1e9}),
        ({"weight": math.nan}, {"weight": None}),
        ({"rewards": []}, {"rewards": ["math"]}),
        ({"max_prompt_length": 0}, {"max_prompt_length": 1}),
        ({"limit": 0}, {"limit": 1}),
        ({"path": []}, {"path": ["a.jsonl"]}),
    ],
)
def test_borders_of_a_sources_options(wrong: dict[str, object], right: dict[str, object]) -> None:
    PromptFile(**{"path": "a.jsonl"} | right)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"PromptFile {next(iter(wrong))} is "):
        PromptFile(**{"path": "a.jsonl"} | wrong)  # type: ignore[arg-type]


def test_several_files_are_one_pool_that_names_the_first(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"question": name, "answer": "1"}]) for name in "cab"]
    pool = PromptFile(paths).load(character_tokenizer(), seed=0)
    assert list(pool.questions) == ["c", "a", "b"]
    assert str(pool.report) == f"{paths[0]} and 2 more (question -> answer): 3 rows read, 3 prompts kept"
    matched = PromptFile(str(tmp_path / "*.jsonl"), glob=True, limit=2).load(character_tokenizer(), seed=0)
    assert list(matched.questions) == ["a", "b"]
    assert PromptFile(paths[:1]).load(character_tokenizer(), seed=0).ids == pool.ids[:1]


def test_the_schema_is_that_of_the_first_sixty_four_rows(tmp_path: Path) -> None:
    rows = [{"question": str(n), "answer": f"so\n#### {n}" if n < 64 else "bare"} for n in range(65)]
    pool = load(write_jsonl(tmp_path / "a.jsonl", rows))
    assert [pool[place].columns["answer"] for place in (0, 63, 64)] == ["0", "63", "bare"]
    rows[63]["answer"] = "bare"
    pool = load(write_jsonl(tmp_path / "b.jsonl", rows))
    assert pool[0].columns["answer"] == "so\n#### 0"


def test_messages_in_parts_are_joined_and_hold_text_alone(tmp_path: Path) -> None:
    def asked(content: object) -> str:
        rows = [{"prompt": [{"role": "user", "content": content}], "answer": "1"}]
        return load(write_jsonl(tmp_path / "a.jsonl", rows)).questions[0]

    assert asked([{"type": "text", "text": "1+1"}, {"type": "text", "text": " = ?"}]) == "1+1 = ?"
    assert asked(["1+1", {"text": "="}]) == "1+1="
    assert asked("1+1") == "1+1"
    with pytest.raises(UserError, match="row 1: a message holds parts other than text"):
        asked([{"type": "text", "text": "1+1"}, {"type": "image", "image": "a.png"}])


def test_the_cause_of_an_unreadable_set_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'json' is neither a local file .*: it is the name of a file format$"):
        open_table("json", None, "train", [])
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "dataset_dict.json").write_text("{")
    with pytest.raises(UserError, match="set' cannot be read as a data set: Expecting property name"):
        open_table(str(tmp_path / "set"), None, "train", [])
