"""`dots evaluate`: benchmarks by name on a policy, a run and a checkpoint; figures, intervals and the table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from datamodules.difficulty.outcomes import read_outcomes
from tests.support.refusal import TINY, Place, files, source

GSM8K = [{"question": f"{i} + 1 =", "answer": f"One more.\n#### {i + 1}"} for i in range(4)]
MATH = [{"problem": f"{i} + 2 =", "solution": "...", "answer": str(i + 2), "level": 1} for i in range(3)]
OLYMPIAD = [
    {"question": f"{i} + 3 =", "context": "Add." if i else None, "solution": ["..."], "final_answer": [f"${i + 3}$"]}
    for i in range(2)
]
SHORT = ("--trainer.accelerator=cpu", "--trainer.devices=1", "--model.val_sampling.max_completion_length=3",
         "--model.val_sampling.num_generations=2", "--model.pass_at_k=[1,2]")  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    for folder, name, rows in (
        ("gsm8k", "test", GSM8K), ("math500", "test", MATH), ("olympiadbench", "train", OLYMPIAD)
    ):  # fmt: skip
        (tmp_path / folder).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / folder / f"{name}.jsonl").write_text(text)
    return Place.at(tmp_path, monkeypatch, capsys)


def paths(*names: str) -> list[str]:
    return [f"--data.test.{name}.path={name}" for name in names]


def results(place: Place) -> tuple[dict[str, Any], Path]:
    found = sorted(place.path.rglob("results.json"), key=lambda file: file.stat().st_mtime_ns)
    return json.loads(found[-1].read_text()), found[-1].parent


def test_a_policy_on_benchmarks_and_a_file(place: Place) -> None:
    (place.path / "mine.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    code, out, said = place.run_with_output(
        "evaluate", str(TINY), "--benchmarks", "gsm8k,olympiadbench", *paths("gsm8k", "olympiadbench"), *SHORT,
        "--data.test.mine.path=mine.jsonl",
    )  # fmt: skip
    assert code == 0, said[-3000:]
    found, folder = results(place)
    metrics, intervals = found["metrics"], found["intervals"]
    assert [metrics[f"test/{name}/prompts"] for name in ("gsm8k", "olympiadbench", "mine")] == [4, 2, 1]
    rows = pq.read_table(folder / "completions" / "gsm8k" / "test.parquet").to_pylist()
    assert {row["answer"] for row in rows} == {"1", "2", "3", "4"}
    assert all("\\boxed{}" in row["prompt"] for row in rows)
    rates = [sum(one["correctness"] for one in rows if one["prompt_id"] == name) / 2 for name in
             {row["prompt_id"] for row in rows}]  # fmt: skip
    assert metrics["test/gsm8k/avg@2"] == pytest.approx(sum(rates) / 4)
    asked = pq.read_table(folder / "completions" / "olympiadbench" / "test.parquet").to_pylist()
    assert [("Add.\n\n1 + 3 =" in row["prompt"]) for row in asked] == [False, False, True, True]
    sets = ("gsm8k", "olympiadbench", "mine")
    for name in ("accuracy", "pass@1", "pass@2"):
        assert metrics[f"test/{name}"] == pytest.approx(sum(metrics[f"test/{one}/{name}"] for one in sets) / 3)
        low, high = intervals[f"test/{name}"]
        assert low - 1e-6 <= metrics[f"test/{name}"] <= high + 1e-6
    table = (folder / "results.md").read_text()
    assert table in out
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:6]] == [
        ["| gsm8k", "4", "2"], ["| olympiadbench", "2", "2"], ["| mine", "1", "2"], ["| mean", "7", "2"]
    ]  # fmt: skip


def test_a_run_and_its_checkpoint_without_the_training_prompts(place: Place) -> None:
    place.config(lambda config: source(config).update(system_prompt="Add the numbers."))
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0, said[-2000:]
    (place.path / "pool.jsonl").unlink()
    run = "runs/small/version_0"
    seen = []
    for given in ([run], [f"{run}/checkpoints/last.ckpt"]):
        code, _, said = place.run_with_output("evaluate", *given, "--benchmarks=math500", *paths("math500"), *SHORT)
        assert code == 0, said[-2000:]
        found, folder = results(place)
        assert Path(found["checkpoint"]) == (place.path / run / "checkpoints" / "last.ckpt").resolve()
        rows = pq.read_table(folder / "completions" / "math500" / "test.parquet").to_pylist()
        # Asked as in training, scored as mathematics, though the run has another reward.
        assert rows[0]["prompt"].startswith("Add the numbers.")
        assert "reward/math" in rows[0]
        seen.append([(row["prompt_id"], row["completion"]) for row in rows])
    assert seen[0] == seen[1]


def test_completions_of_a_policy_without_a_run_have_room(place: Place) -> None:
    """A context of 512 tokens leaves 384 beside a prompt of a quarter; a stated limit is kept, for one set too."""
    common = ("--benchmarks=gsm8k", *paths("gsm8k"), "--data.test.gsm8k.limit=1", *SHORT[:2],
              "--model.val_sampling.num_generations=1", "--model.pass_at_k=1")  # fmt: skip
    for options, length in (((), 384), (("--model.val_sampling.max_completion_length=5",), 5),
                            (("--data.test.gsm8k.sampling.max_completion_length=6",), 6)):  # fmt: skip
        code, _, said = place.run_with_output("evaluate", str(TINY), *common, *options)
        assert code == 0, said[-2000:]
        assert ("dots: completions end after 384 tokens (4,096, or" in said) == (length != 5)
        found, folder = results(place)
        assert found["sets"]["test/gsm8k"]["sampling"]["max_completion_length"] == length
        rows = pq.read_table(folder / "completions" / "gsm8k" / "test.parquet").to_pylist()
        assert all(row["completion_tokens"] <= length for row in rows)


def test_several_checkpoints_are_predicted_and_read_as_groups(place: Place) -> None:
    """Each as by itself, in a folder of its own; `dots difficulty fit` reads a visit of each."""
    (place.path / "my_rewards.py").write_text(
        "def graded(completions, **_):\n    return [sum(map(ord, one)) % 7 / 6 for one in completions]\n"
    )
    rows = [{"question": f"{i} + {i % 7} =", "answer": "1"} for i in range(40)]
    (place.path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def change(config: dict[str, Any]) -> None:
        config["model"]["init_args"] |= {"rewards": "my_rewards.graded", "optimization": {"learning_rate": 0.05}}
        config["model"]["init_args"]["sampling"]["num_generations"] = 4
        config["trainer"]["max_steps"] = 2

    place.config(change)
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0, said[-2000:]
    saved = place.path / "runs/small/version_0/checkpoints"
    checkpoints = [str(one) for one in sorted(saved.glob("*.ckpt"))]
    assert [Path(one).name for one in checkpoints] == ["last.ckpt", "step_00000001.ckpt", "step_00000002.ckpt"]
    prompts = ("--data.test.mine.path=mine.jsonl", *SHORT)
    code, out, said = place.run_with_output("predict", *checkpoints, *prompts)
    assert code == 0, said[-2000:]
    assert "dots: predict 1 of 2" in said  # last.ckpt is a link to the second
    folders = ["runs/small/version_1", "runs/small/version_2"]
    assert f"dots difficulty fit --outcomes {' '.join(folders)} ..." in out
    code, said = place.run("predict", checkpoints[2], *prompts)
    assert code == 0, said[-2000:]
    found = [
        [(row["prompt_id"], row["completion"], row["correctness"]) for row in
         pq.read_table(place.path / folder / "completions/mine/predict.parquet").to_pylist()]
        for folder in (*folders, "runs/small/version_3")
    ]  # fmt: skip
    assert found[1] == found[2] and found[0] != found[1]
    assert [
        json.loads((place.path / one / "results.json").read_text())["checkpoint"] for one in folders
    ] == checkpoints[1:]

    code, said = place.run(
        "difficulty", "fit", "--outcomes", *folders, "--encoder=statistics", "--out=predictor", "--cache_dir=cache"
    )
    assert code == 0, said[-2000:]
    settings = json.loads((place.path / "predictor/results.json").read_text())["settings"]
    assert (settings["questions"], settings["visits"]) == (40, 2)
    outcomes = read_outcomes(*(place.path / one for one in folders))
    for visit, completions in enumerate(found[:2]):
        rates = [sum(completions[row + one][2] for one in range(2)) / 2 for row in range(0, 80, 2)]
        assert outcomes.rates[:, visit].tolist() == pytest.approx(rates)
    assert outcomes.questions[3] == rows[3]["question"]


def test_what_cannot_be_measured_is_refused(place: Place) -> None:
    said = place.refused("evaluate", str(TINY), "--benchmarks", "gsm8k,math50", *paths("gsm8k"))
    assert "There is no benchmark 'math50': did you mean 'math500'?" in said
    assert "no prompts are given" in place.refused("evaluate", str(TINY))
    assert "is not a run folder" in place.refused("evaluate", "runs/none")
    assert "runs/a/b is not a run folder" in place.refused("predict", str(TINY), "runs/a/b", "--benchmarks=gsm8k")
    said = place.refused(
        "evaluate", str(TINY), "--benchmarks=olympiadbench", "--data.test.olympiadbench.path=gsm8k/test.jsonl"
    )
    assert "final_answer" in said and "gsm8k/test.jsonl" in said, said
    assert "--benchmarks is given nothing" in place.refused("evaluate", "run.yaml", "--benchmarks")
    assert not [name for name in files(place.path) if "results" in name]
