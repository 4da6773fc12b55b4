"""Reference answers through the command: what rewards read, what reaches a user's function, what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
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
    empty: list[dict[str, Any]] = [{"answer": ""}, {"answer": None}, {"answer": "  "}, {}]
    write_pool(
        place.path / "pool.jsonl", [{"question": f"f{i}", "tests": "t" * i} | row for i, row in enumerate(empty)]
    )
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


# Reference answer, a right completion and a wrong one.
EXPRESSIONS = [
    (r"The roots are $\boxed{2}$ and $\boxed{3}$.", r"\boxed{3} or \boxed{2}", r"\boxed{3}"),
    (r"So \boxed{-1}, \boxed{1} and \boxed{7}", r"\boxed{7, 1, -1}", r"\boxed{1} and \boxed{7}"),
    (r"\fbox{42}", r"\fbox{42}", r"\fbox{24}"),
    (r"\fbox{-42}", r"\boxed{-42}", r"-42, no: \boxed{42}"),
    (r"Hence $x = \fbox{4}$ or $x = \fbox{9}$.", r"\fbox{9, 4}", r"\fbox{9}"),
    (r"It is $\fbox{\frac{1}{2}}$.", r"\fbox{0.5}", r"\fbox{2}"),
    ("#### 3,5", r"\boxed{3, 5}", r"\boxed{35}"),
    ("#### 1, 2, 3", r"\boxed{1,2,3}", r"\boxed{6}"),
    ("#### 1,234", r"\boxed{1234}", r"\boxed{1, 234}"),
    ("#### 2,5,7", r"\boxed{2,5,7}", r"\boxed{257}"),
    ("#### 12,34", r"\boxed{12,34}", r"\boxed{1234}"),
    ("#### $1,234.50", r"\boxed{1234.5}", r"\boxed{1234}"),
    ("4", r"\boxed{4}", r"\boxed{} 4"),
    ("4", r"5 and so \boxed{4}", r"The \boxed{} is 4"),
    ("4", r"\fbox{4.0}", r"\boxed{?} 4"),
    ("4", r"\boxed{8/2}", r"\boxed{\text{ }} so 4"),
    ("6", r"\boxed{6}", r"\boxed{\,} 6"),
    ("6", r"$\boxed{ 6 }$.", r"\boxed{...} = 6"),
    ("6", r"\fbox{6}", r"6, which I box: \boxed{6"),
    ("CAB", r"\boxed{CAB}", r"\boxed{ABC}"),
    ("STOP", r"\boxed{\text{STOP}}", r"\boxed{POTS}"),
    (r"\text{listen}", r"\boxed{listen}", r"\boxed{\text{silent}}"),
    ("no", r"\boxed{No}", r"\boxed{on}"),
    (r"\text{EVIL}", r"\boxed{EVIL}", r"\boxed{VILE}"),
    ("2004_5", r"\boxed{2004_5}", r"\boxed{2004_7}"),
    ("1011_2", r"\boxed{1011_{2}}", r"\boxed{1011}"),
    ("777_8", r"\boxed{777_{8}}", r"\boxed{777_9}"),
    ("FF_{16}", r"\boxed{FF_{16}}", r"\boxed{FF_{17}}"),
    ("1e-10", r"\boxed{10^{-10}}", r"\boxed{2e-10}"),
    (r"4 \times 10^{-30}", r"\boxed{4 \cdot 10^{-30}}", r"\boxed{0}"),
    (r"1.6\times10^{-19}", r"\boxed{1.6 \cdot 10^{-19}}", r"\boxed{3.2\times10^{-19}}"),
    (r"6.02 \times 10^{23}", r"\boxed{6.02e23}", r"\boxed{6.03 \times 10^{23}}"),
    ("12,5", r"\boxed{12, 5}", r"\boxed{5,12}"),
    ("(2, 7)", r"\boxed{\left(2,7\right)}", r"\boxed{(7, 2)}"),
    ("red, blue", r"\boxed{red, blue}", r"\boxed{blue, red}"),
    ("3:4", r"\boxed{3:4}", r"\boxed{4:3}"),
    (r"\{1, 2\}", r"\boxed{\{2, 1\}}", r"\boxed{(1, 2)}"),
    (0.00005, r"\boxed{5 \times 10^{-5}}", r"\boxed{5}"),
    (1e-7, r"\boxed{10^{-7}}", r"\boxed{-6}"),
    (6.02e23, r"\boxed{6.02 \times 10^{23}}", r"\boxed{601999999999999995805696}"),
    (r"$\boxed{\$7}$", r"\boxed{7}", r"\boxed{70}"),
    (r"-\$5", r"\boxed{-5}", r"\boxed{5}"),
    (r"\$1{,}000", r"\boxed{\$1,000}", r"\boxed{1}"),
    (r"\boxed{\$18.90}", r"\boxed{18.9}", r"\boxed{1890}"),
    (r"5\$", r"\boxed{5}", r"\boxed{6}"),
    (r"$\boxed{\pounds 30}$", r"\boxed{30}", r"\boxed{\$30}"),
    ("US$40", r"\boxed{40}", r"\boxed{4}"),
    (r"\framebox{-3}", r"\framebox{-3}", r"\framebox{3}"),
    ("2020-01-02", r"\boxed{2020-01-02}", r"\boxed{2020-02-01}"),
    (2.5e22, r"\boxed{2.5 \cdot 10^{22}}", r"\boxed{24999999999999997902848}"),
]
NUMBERS = [
    ("12 km^2", "12 m^2", "2"),
    ("12 km^2", "about 12", "144 km^2"),
    ("7 m^3 of water", "it holds 7 m^3", "it holds 3"),
    ("1 1/2", "1.5", "1/2"),
    ("2 3/4 cups", "2.75 cups", "3/4"),
    ("-1 1/4", "-5/4", "-3/4"),
    ("5 m/s^2", "5 m/s^2", "2"),
    (r"10 cm^{2}", r"10 cm^{2}", "2"),
    (0.00005, "0.00005", "5"),
    (1e-7, "1e-7", "7"),
    ("#### 1,018", "1,018", "18"),
]


@pytest.mark.parametrize(
    ("table", "reward"),
    [(EXPRESSIONS, ("app.rewards.Math", {"require_boxed": True})), (NUMBERS, ("app.rewards.Numeric", {}))],
    ids=["math", "numeric"],
)
def test_right_and_wrong_answers_of_a_run(
    place: Place, table: list[tuple[object, str, str]], reward: tuple[str, dict[str, Any]]
) -> None:
    pool = [{"question": f"{at}?", "answer": gold, "written": both} for at, (gold, *both) in enumerate(table)]
    # One file for each row: a column of the others has one type.
    for at, row in enumerate(pool):
        write_pool(place.path / f"pool_{at}.jsonl", [row])
    rewards(place, reward, path=[f"pool_{at}.jsonl" for at in range(len(pool))])
    command = "fit", "--config", "run.yaml", f"--data.prompts_per_step={len(pool)}"
    code, said = place.run(*command, "--model.engine=tests.support.written_engine.Written")
    assert code == 0, said[-2000:]
    seen = pq.read_table(place.path / "runs/small/version_0/completions/step_00000000.parquet").to_pylist()
    found = {(row["question"], row["completion"]): row["correctness"] for row in seen}
    expected = {(row["question"], text): float(text == row["written"][0]) for row in pool for text in row["written"]}
    assert found == expected
