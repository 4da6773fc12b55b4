"""Faults of data that outsiders met, through the command: the rows that were named are trained on, or one line says why."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.refusal import Place, data, model, source, write_pool

FIT = ("fit", "--config", "run.yaml")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


def sums(*numbers: int) -> list[dict[str, Any]]:
    return [{"question": f"{n} + 1 =", "answer": str(n + 1)} for n in numbers]


def trained_on(place: Place, *arguments: str) -> str:
    """Run; return the hash of the training prompts that its newest checkpoint holds."""
    code, said = place.run(*FIT, *arguments)
    assert code == 0, said[-2000:]
    newest = max(place.path.rglob("last.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    return torch.load(newest, weights_only=True)["run_identity"]["prompts"]


def test_a_run_in_a_folder_whose_name_is_a_pattern_trains_on_its_own_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for name, rows in (("exp1", sums(*range(20, 28))), ("exp[1]", sums(*range(8))), ("plain", sums(*range(8)))):
        (tmp_path / name).mkdir()
        place = Place.at(tmp_path / name, monkeypatch, capsys)
        write_pool(place.path / "pool.jsonl", rows)
        found[name] = trained_on(place)
    assert found["exp[1]"] == found["plain"] != found["exp1"]


def test_a_file_rewritten_with_its_old_time_is_trained_on(place: Place) -> None:
    pool = place.path / "pool.jsonl"
    first, time = trained_on(place), os.stat(pool)
    write_pool(pool, sums(*range(1, 9)))
    os.utime(pool, ns=(time.st_atime_ns, time.st_mtime_ns))
    assert trained_on(place) != first


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "x.jsonl",
            b'{"question": "1 + 1 =", "answer": "2"}\n{"question": "caf\xe9"}\n',
            "'x.jsonl' line 2 is not UTF-8",
        ),
        ("x.csv", b"question,answer\nWhat is 1 + 1?,2,easy\n", "'x.csv' line 2 has 3 fields, but the header names 2"),
        ("x.jsonl", b'{"question": ' + b"[" * 30_000, "'x.jsonl' line 1 is nested too deeply"),
        ("pool*.jsonl", None, "'pool*.jsonl' does not exist: "),
        ("~nosuch/x", None, "'~nosuch/x' does not exist: there is no user 'nosuch'"),
        ("json", None, "'json' is neither a local file or folder"),
    ],
)
def test_one_line(place: Place, name: str, content: bytes | None, said: str) -> None:
    if content is not None:
        (place.path / name).write_bytes(content)
    place.config(lambda config: source(config).update(path=name))
    assert said in place.refused(*FIT)
