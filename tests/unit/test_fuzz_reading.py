"""Whatever stands in a data file, reading it gives whole prompts or one line of what is wrong: nothing else."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.answers import accepted, boxed_answer, extract, gsm8k_answer
from datamodules.errors import UserError
from datamodules.prompts.file import SchemaOverrides, detect
from datamodules.prompts.files import open_table
from datamodules.prompts.readers import FileOptions
from datamodules.prompts.reading import read_pool
from datamodules.prompts.tables import ListTable
from datamodules.prompts.templates import Renderer
from tests.support.fuzzing import examples
from tests.support.reading_helpers import character_tokenizer

QUICK = settings(max_examples=examples(50), deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = ("prompt", "messages", "input", "question", "answer", "solution", "reward_model", "extra_info", "id", "label")
TEXT = st.text(max_size=12) | st.sampled_from(["#### 7", r"\boxed{1{2}}", r"\boxed{", "{question}", "\x00", "\ud800"])
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | TEXT
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", ""]), "content": PLAIN})
VALUE = st.recursive(
    PLAIN | st.lists(MESSAGE, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.sampled_from(["ground_truth", "index"]), inner, max_size=3)
    ),
    max_leaves=6,
)
TOKENIZERS = {chat: character_tokenizer(chat=chat) for chat in (False, True)}


@QUICK
@given(st.lists(st.fixed_dictionaries({}, optional=dict.fromkeys(NAMES, VALUE)), min_size=1, max_size=5), st.booleans())
def test_rows_of_any_kind(rows: list[dict[str, Any]], chat: bool) -> None:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name) for name in columns} for row in rows]
    try:
        schema = detect(columns, rows, SchemaOverrides(), "fuzz")
        pool = read_pool(ListTable(rows), schema, Renderer(TOKENIZERS[chat]), "fuzz", max_prompt_length=200)
    except UserError:
        return
    report = pool.report
    assert report is not None
    assert len(pool) == report.kept == report.read - report.empty - report.duplicates - report.overlong > 0
    assert len(set(pool.ids)) == len(pool)
    for position, prompt in enumerate(pool):
        assert (prompt.index, prompt.id) == (position, pool.ids[position])
        assert prompt.question == pool.questions[position]
        assert (schema.prompt in prompt.columns) == (schema.prompt == "question")
        assert prompt.columns["question"] == prompt.question or "question" in columns
        assert all(isinstance(token, int) for token in prompt.token_ids)


@QUICK
@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".parquet"]))
def test_files_of_any_bytes(content: bytes, ending: str) -> None:
    _opens_or_says_why(content, ending)


@QUICK
@given(
    st.lists(st.dictionaries(st.sampled_from(NAMES), PLAIN, max_size=3), max_size=4),
    st.integers(0, 400),
    st.binary(max_size=3),
)
def test_damaged_lines(rows: list[dict[str, Any]], place: int, noise: bytes) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    _opens_or_says_why(whole[:place] + noise + whole[place + len(noise) :], ".jsonl")


def _opens_or_says_why(content: bytes, ending: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"data{ending}")
        path.write_bytes(content)
        said, rows = str(path), []
        try:
            table = open_table(str(path), None, "train", FileOptions())
            rows = table.rows(range(len(table)))
        except UserError as error:
            said = str(error)
        assert str(path) in said
        assert all(isinstance(row, dict) for row in rows)


@given(st.text(alphabet=r"\{}bofxed #1,." + "\n", max_size=60))
def test_boxes_are_found_as_a_plain_scan_finds_them(text: str) -> None:
    """Of all openings, the last whose brace is closed; escaped braces count for nothing."""
    found = None
    for start in range(len(text)):
        for opening in (r"\boxed", r"\fboxed"):
            rest = text[start + len(opening) :]
            if text.startswith(opening, start) and rest.lstrip().startswith("{"):
                inside = _closed(rest[rest.index("{") + 1 :])
                found = inside if inside is not None else found
    if found is not None:
        assert boxed_answer(text) == found.strip()


def _closed(text: str) -> str | None:
    depth, place = 1, 0
    while place < len(text):
        if text[place] == "\\":
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[:place]
        place += 1
    return None


@given(VALUE, st.sampled_from(["verbatim", "gsm8k", "boxed"]))
def test_reference_answers_are_texts(value: Any, answer_format: Any) -> None:
    found = extract(value, answer_format)
    assert all(isinstance(text, str) and text.strip() for text in accepted(found))
    if isinstance(value, str):
        assert found is None or (isinstance(found, str) and found.strip())
    else:
        assert found is value or found is None


@given(st.text(max_size=20), st.from_regex(r"-?\d{1,3}(,\d{3})*(\.\d+)?", fullmatch=True))
def test_gsm8k_answers_come_back(reasoning: str, number: str) -> None:
    assert gsm8k_answer(f"{reasoning}\n#### {number}  \n") == number.replace(",", "")


@pytest.mark.parametrize("text", [r"\boxed{" * 50_000, r"\boxed{1}" * 50_000, "{" * 500_000, r"\boxed " * 100_000])
def test_long_answers_take_no_quadratic_time(text: str) -> None:
    import time

    started = time.perf_counter()
    boxed_answer(text)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("row", [{"prompt": "half \ud83d"}, {"prompt": "whole", "answer": "\udc00"}])
def test_half_a_surrogate_pair_is_named(row: dict[str, str]) -> None:
    rows = [{"prompt": "a sun \U0001f31e", "answer": "1"}, {"answer": "1", **row}]
    schema = detect(["prompt", "answer"], rows, SchemaOverrides(), "some.jsonl")
    with pytest.raises(UserError, match=r"^some.jsonl: row 2 holds \\ud(83d|c00), half of a surrogate pair"):
        read_pool(ListTable(rows), schema, Renderer(TOKENIZERS[False]), "some.jsonl", max_prompt_length=200)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"prompt": "a"},\n\x80', "line 2 is not UTF-8 .byte 0x80: invalid start byte.. Save the file as UTF-8"),
        (b'[{"prompt": "a"},\n{"prompt"}]', "line 2: .*Write a list of objects"),
        (b"[" * 100_000, "nested too deeply. Write a list of objects"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
def test_a_broken_array_is_named(content: bytes, said: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{ending}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data{ending}'.*{said}"):
        open_table(str(path), None, "train", FileOptions())


def test_a_line_nested_too_deeply_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": ' + "[" * 100_000 + "\n")
    with pytest.raises(UserError, match=r"data.jsonl' line 2 is nested too deeply"):
        open_table(str(path), None, "train", FileOptions())
