"""Reference answers through the command: what rewards read, what reaches a user's function, what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.refusal import Place, model, source, write_pool


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


SPY = """
import json
def spy(completions, answer, **columns):
    with open("seen.jsonl", "a") as file:
        print(*(json.dumps([str(type(one).__name__), one]) for one in answer), sep="\\n", file=file)
    return [float(len(str(completion))) for completion in completions]
"""


def rows(place: Place, answers: list[str]) -> None:
    text = [f'{{"question": "question {at} =", "answer": {answer}}}\n' for at, answer in enumerate(answers)]
    (place.path / "pool.jsonl").write_text("".join(text))


def rewards(place: Place, *named: tuple[str, dict[str, Any]], **options: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        model(config)["rewards"] = [{"class_path": path, "init_args": arguments} for path, arguments in named]
        source(config).update(options)

    place.config(change)


@pytest.mark.parametrize(
    "written",
    [["7", "8", "0", "123456789012345678901234567890"], ['{"a": 1}', "[1, 2.5]", "true", "0.00005", '"7"', '"1.50"']],
)
def test_answers_reach_a_function_as_they_are_in_the_file(place: Place, written: list[str]) -> None:
    (place.path / "spy_rewards.py").write_text(SPY)
    rows(place, written)
    rewards(place, ("app.rewards.Function", {"path": "spy_rewards.spy"}))
    code, said = place.run("fit", "--config", "run.yaml", f"--data.prompts_per_step={len(written)}")
    assert code == 0, said[-2000:]
    seen = [json.loads(line) for line in (place.path / "seen.jsonl").read_text().splitlines()]
    expected = [[type(value).__name__, value] for value in map(json.loads, written)]
    assert sorted(map(json.dumps, seen[-2 * len(written) :])) == sorted(map(json.dumps, expected * 2))


def test_rows_without_an_answer_train_where_none_is_needed(place: Place) -> None:
    (place.path / "spy_rewards.py").write_text("def run(completions, tests): return [float(len(t)) for t in tests]\n")
    write_pool(place.path / "pool.jsonl", [{"question": f"f{i}", "answer": "", "tests": "t" * i} for i in range(4)])
    rewards(place, ("app.rewards.Function", {"path": "spy_rewards.run"}))
    rewards(place, ("app.rewards.Function", {"path": "spy_rewards.run"}))
    assert "4 empty" in place.refused("fit", "--config", "run.yaml", touches=True)
    code, said = place.run("fit", "--config", "run.yaml", "--data.train.answer_column", "null")
    assert code == 0, said[-2000:]


def test_answers_that_no_reward_reads_are_counted_and_the_first_is_named(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    rows(place, ['"7"', r'"\\sqrt{2}"', '"3,5"', r'"$\\boxed{\\$7}$"', '"12 km^2"', '"2004_5"'])
    rewards(place, ("app.rewards.Numeric", {}))
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0, said[-2000:]
    lines = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert len(lines) == 1
    assert "3 of 6 reference answers of the train prompts cannot be read by numeric" in lines[0]
    assert r"the first is '\\sqrt{2}' of prompt" in lines[0]


def test_answers_of_which_none_can_be_read_are_refused(place: Place) -> None:
    rows(place, ['"east"', '"west"', '"north"'])
    rewards(place, ("app.rewards.Numeric", {}))
    said = place.refused("fit", "--config", "run.yaml", touches=True)
    assert "3 of 3 reference answers of the train prompts cannot be read by numeric, the first is 'east'" in said
