"""The file that is named is read, whatever its name and neighbours, and what is wrong in it is named by its line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pytest

from datamodules.errors import UserError
from datamodules.pool import PromptPool
from datamodules.prompts.file import PromptFile
from tests.support.reading_helpers import character_tokenizer, write_jsonl

STRANGE = [
    "pool[1]",
    "a*b",
    "q?",
    "{a,b}",
    "two words",
    "x#y",
    "p%20q",
    "a::b",
    "a!b",
    "~nosuch",
    "[!a]",
    "é",
    "-",
    "**",
]
"""Names that are patterns, URLs or users to some library."""

DECOYS = ["pool1", "axb", "qq", "a", "b", "p q", "x", "z"]
"""Names that these would match as patterns."""

KINDS = [".jsonl", ".json", ".parquet", ".csv", "saved", "splits", "folder"]


def rows_of(mark: str) -> list[dict[str, Any]]:
    return [{"question": f"{mark} {n}?", "answer": f"{n}"} for n in range(3)]


def write(path: Path, kind: str, mark: str) -> Path:
    """Write three rows; return the path to name in a config."""
    rows = rows_of(mark)
    data = datasets.Dataset.from_list(rows)
    if kind == "saved":
        data.save_to_disk(str(path))
    elif kind == "splits":
        datasets.DatasetDict({"train": data}).save_to_disk(str(path))
    elif kind == "folder":
        path.mkdir(parents=True)
        write_jsonl(path / f"{path.name}.jsonl", rows)
    else:
        path = path.with_name(path.name + kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == ".jsonl":
            write_jsonl(path, rows)
        elif kind == ".json":
            path.write_text(json.dumps(rows))
        elif kind == ".parquet":
            with path.open("wb") as file:
                data.to_parquet(file)
        else:
            path.write_text("question,answer\n" + "".join(f'"{row["question"]}",{row["answer"]}\n' for row in rows))
    return path


def load(path: str | Path, **options: Any) -> PromptPool:
    return PromptFile(str(path), **options).load(character_tokenizer(), 0)


def digest(pool: PromptPool) -> str:
    read = [[prompt.question, prompt.columns["answer"]] for prompt in pool]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


def expected(mark: str) -> str:
    read = [[row["question"], row["answer"]] for row in rows_of(mark)]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_is_no_pattern(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "exp[1]"
    for decoy in DECOYS:
        write(place / decoy, kind, "decoy")
        write(tmp_path / "exp1" / decoy, kind, "decoy")
    monkeypatch.chdir(place)
    for name in STRANGE:
        # `datasets` itself can't write a data set under a name that looks like a URL.
        written = write(tmp_path / "written", kind, name).rename(place / (name + (kind if kind[0] == "." else "")))
        write(tmp_path / "exp1" / "same", kind, "decoy")
        assert digest(load(written)) == digest(load(written.name)) == expected(name), name
        link = tmp_path / f"link to {name}{written.suffix}"
        link.symlink_to(written)
        assert digest(load(link)) == expected(name), name
        _remove(tmp_path / "exp1" / ("same" + (kind if kind[0] == "." else "")))


def _remove(path: Path) -> None:
    if path.is_dir():
        for inner in path.iterdir():
            _remove(inner)
        path.rmdir()
    else:
        path.unlink()


def test_a_folder_of_strange_names_is_read_whole(tmp_path: Path) -> None:
    folder = tmp_path / "data[0]"
    folder.mkdir()
    for name in [*STRANGE, "a b", "a_b"]:
        write_jsonl(folder / f"{name}.jsonl", [{"question": name}])
    assert sorted(load(folder).questions) == sorted([*STRANGE, "a b", "a_b"])
    (folder / "nested::1").mkdir()
    write_jsonl(folder / "nested::1" / "test[1].jsonl", [{"question": "held out"}])
    assert list(load(folder, split="test").questions) == ["held out"]


@pytest.mark.parametrize(
    "path", ["pool*.jsonl", "po?l.jsonl", "*.jsonl", "./*", "fold*", "json", "csv", "parquet", "text"]
)
def test_what_no_file_is_called_is_refused(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "pool.jsonl", rows_of("x"))
    write(tmp_path / "folder", "folder", "x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"does not exist|neither a local file or folder"):
        load(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("~nosuch/x.jsonl", "there is no user 'nosuch'"),
        ("~nosuch", "there is no user 'nosuch'"),
        ("~/nosuch.jsonl", "does not exist: "),
        ("x" * 5000, "cannot be opened"),
        ("./" + "x" * 300 + ".jsonl", "cannot be opened"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(path: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("split", "kept"),
    [("train[:2]", [0, 1]), ("train[-1:]", [2]), ("train[:1]+train[2:]", [0, 2]), ("train[:67%]", [0, 1])],
)
def test_slices(tmp_path: Path, kind: str, split: str, kept: list[int]) -> None:
    pool = load(write(tmp_path / "data", kind, "x"), split=split)
    assert list(pool.questions) == [f"x {n}?" for n in kept]
    assert [prompt.question for prompt in pool] == list(pool.questions)


@pytest.mark.parametrize("split", ["train[:10%", "tr ain", "train[a:b]", "", "train+test"])
def test_a_wrong_split_is_one_line(tmp_path: Path, split: str) -> None:
    with pytest.raises(UserError, match=r"split '.*' cannot be read: "):
        load(write(tmp_path / "data", ".jsonl", "x"), split=split)
    with pytest.raises(UserError, match="split"):
        load(write(tmp_path / "data", "folder", "x"), split=split)


@pytest.mark.parametrize("kind", KINDS)
def test_a_rewritten_file_with_its_old_time_is_read_again(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / "data", kind, "old")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    times = {file.relative_to(tmp_path): os.stat(file) for file in files}
    assert digest(load(path)) == expected("old")
    _remove(path)
    write(tmp_path / "data", kind, "new")
    for name, time in times.items():
        if (tmp_path / name).exists():
            os.utime(tmp_path / name, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert digest(load(path)) == expected("new")


GOOD = b'{"question": "a", "answer": "1"}\n'

BROKEN: dict[str, tuple[str, bytes, str]] = {
    "latin-1 line": (
        "x.jsonl",
        GOOD + '{"question": "caf\u00e9"}\n'.encode("latin-1"),
        "line 2 is not UTF-8 .byte 0xE9",
    ),
    "latin-1 line of .json": ("x.json", GOOD + '{"question": "\u00e9"}\n'.encode("latin-1"), "line 2 is not UTF-8"),
    "latin-1 array": (
        "x.json",
        '[{"question": "a"},\n{"question": "\u00e9"}]'.encode("latin-1"),
        "line 2 is not UTF-8",
    ),
    "latin-1 table": ("x.csv", "question\na\n\u00e9\n".encode("latin-1"), "line 3 is not UTF-8 .byte 0xE9"),
    "UTF-16 without a mark": ("x.jsonl", GOOD.decode().encode("utf-16-le"), "line 1: "),
    "NUL": ("x.jsonl", GOOD + b'{"question": "a\0b"}\n', "line 2: Invalid control character"),
    "NUL in a table": ("x.csv", b"question,answer\na\0b,1\n", "line 2 cannot be read as csv: it holds a NUL"),
    "brackets": (
        "x.jsonl",
        GOOD + b'{"question": "a", "b": ' + b"[" * 30_000 + b"]" * 30_000 + b"}\n",
        "line 2 is nested too",
    ),
    "unclosed brackets": ("x.jsonl", GOOD + b"[" * 30_000, "line 2 is nested too deeply"),
    "braces": (
        "x.json",
        GOOD + b'{"a":' * 200 + b"1" + b"}" * 200,
        "line 2 is nested too deeply .more than 100 levels",
    ),
    "brackets in an array": (
        "x.json",
        b'[{"question": "a", "b": ' + b"[" * 300 + b"]" * 300 + b"}]",
        "row 1 is nested",
    ),
    "long line": ("x.jsonl", GOOD + b'{"question": "' + b"a" * 100_000_000 + b'"}\n', "line 2 has 100,000,017 bytes"),
    "digits": ("x.jsonl", GOOD + b'{"question": "a", "n": ' + b"9" * 5000 + b"}\n", "line 2: "),
    "array of numbers": ("x.json", b'[{"question": "a"}, 7]', "row 2: '7' is not an object"),
    "a field more": (
        "x.csv",
        b"question,answer\nWhat is 1 + 1?,2,easy\n",
        "line 2 has 3 fields, but the header names 2",
    ),
    "a field less": ("x.csv", b"question,answer\na,1\nb\n", "line 3 has 1 fields, but the header names 2 columns"),
    "a field more after a long one": ("x.csv", b'question,answer\n"a\nb",1\nc,2,3\n', "line 4 has 3 fields"),
    "unclosed quote": (
        "x.csv",
        b'question,answer\na,1\n"b,2\nc,3\n',
        "line 3 cannot be read as csv: unexpected end of data",
    ),
    "quote within quotes": (
        "x.csv",
        b'question,answer\n"say "hi"",1\n',
        "line 2 cannot be read as csv: ',' expected after",
    ),
    "the same name twice": ("x.csv", b"question,answer,answer\na,1,2\n", "names the column 'answer' more than once"),
    "a bare comma": ("x.csv", b"question\nWhat is 1, 2?\n", "line 2 has 2 fields, but the header names 1"),
    "two separators": ("x.csv", b"question;answer\na;1\nb,2\n", "line 3 has 1 fields"),
    "a key twice": (
        "x.jsonl",
        b'{"question": "a"}\n\n{"question": "b", "question": "c"}\n',
        "line 3: the key 'question' is",
    ),
    "a key twice within": (
        "x.jsonl",
        b'{"question": "a", "x": [{"y": 1, "y": 1}]}\n',
        "line 1: the key 'y' is given twice",
    ),
    "a key twice once read": (
        "x.jsonl",
        b'{"question": "a", "\\u0071uestion": "b"}\n',
        "line 1: the key 'question' is",
    ),
    "a key twice in an array": (
        "x.json",
        b'[\n {"question": "a, ]"},\n\n {"question": "b",\n  "x": {"z": 1, "z": 2}}\n]',
        "line 4: the key 'z' is given twice",
    ),
    "a key twice in the first object": ("x.json", b'[{"a": 1, "a": 2}]', "line 1: the key 'a' is given twice"),
    "thousands of digits in an array": (
        "x.json",
        b'[{"a": 1},\n{"a": ' + b"9" * 5000 + b"}]",
        "line 2: Exceeds the limit",
    ),
    "no text in parquet": ("x.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", "cannot be read as parquet: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_named_by_its_line(tmp_path: Path, name: str) -> None:
    file, content, said = BROKEN[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        load(tmp_path / file)
    assert len(str(raised.value)) < 600


READ: dict[str, bytes] = {
    "commas": b'question,answer,level\n"a, b",1,3\n"say ""hi""",2,4\n',
    "semicolons": b'question;answer;level\na, b;1;3\n"say ""hi""";2;4\n',
    "tabs": b'question\tanswer\tlevel\na, b\t1\t3\nsay "hi"\t2\t4\n',
    "byte order mark": b'\xef\xbb\xbfquestion,answer,level\n"a, b",1,3\n"say ""hi""",2,4\n',
    "carriage returns": b'question,answer,level\r\n"a, b",1,3\r\n\r\n"say ""hi""",2,4\r\n',
    "a column more": b'question,answer,level,\n"a, b",1,3,\n"say ""hi""",2,4,\n',
    "quoted names": b'"question","answer","level"\n"a, b","1","3"\n"say ""hi""","2","4"',
    "blank lines first": b'\n\nquestion;answer;level\na, b;1;3\n"say ""hi""";2;4\n',
}


@pytest.mark.parametrize("name", READ)
def test_tables_that_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / "x.csv").write_bytes(READ[name])
    read = [(prompt.question, prompt.columns["answer"], prompt.columns["level"]) for prompt in load(tmp_path / "x.csv")]
    assert read == [("a, b", "1", 3), ('say "hi"', "2", 4)]


def test_other_columns_of_a_table_keep_what_they_say(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        "question,code,number,mixed,part,truth,gap,large\n"
        "a,007,7,1,0.5,True,1,9007199254740993\n"
        "b,010,-3,x,1e-3,false,,2\n"
    )
    first, second = (dict(prompt.columns) for prompt in load(tmp_path / "x.csv"))
    del first["question"], second["question"]
    assert first == {
        "code": "007",
        "number": 7,
        "mixed": "1",
        "part": 0.5,
        "truth": True,
        "gap": "1",
        "large": 2**53 + 1,
    }
    assert second == {"code": "010", "number": -3, "mixed": "x", "part": 0.001, "truth": False, "gap": "", "large": 2}


def test_a_byte_order_mark_is_no_part_of_a_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + GOOD + b"\n" + GOOD.replace(b"a", b"b"))
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[" + GOOD.strip() + b"]")
    assert load(tmp_path / "x.jsonl")[0].question == load(tmp_path / "x.json")[0].question == "a"


def test_values_of_lines_are_as_in_the_file(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"question": "a", "meta": {"x": 1}, "n": 2**70, "when": "2024-01-01", "mixed": 1},
        {"question": "b", "meta": {"y": [1, "2"]}, "mixed": "1", "late": 0.1},
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    columns = ["question", "meta", "n", "when", "mixed", "late"]
    assert [dict(prompt.columns) for prompt in load(tmp_path / "x.jsonl")] == [
        {name: row.get(name) for name in columns} for row in rows
    ]
