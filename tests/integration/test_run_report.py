"""What a run, and dots validate, test and predict, leave for a reader: completions, prompts, page and results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from app.reporting.run_page import write_report
from tests.support.browser import browser
from tests.support.refusal import Place, data, model, write_pool

pytestmark = pytest.mark.slow

RUN = Path("runs/small/version_0")
LEVELS = ["easy", "hard", "mixed", "easy", "hard", "mixed"]
SUCCESS = {"easy": 1.0, "hard": 0.0, "mixed": 0.5}
HOSTILE = "<script>alert(1)</script> & $x_1$ `|`"
REWARDS = """
from collections import Counter

def by_level(prompts, level, **rest):
    seen = Counter()
    for prompt, each in zip(prompts, level):
        seen[prompt] += 1
        yield 1.0 if each == "easy" or each == "mixed" and seen[prompt] == 1 else 0.0
"""
FIT = ("fit", "--config", "run.yaml", "--trainer.max_steps=3", "--completions.every=1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    """Six prompts whose outcome their column says; two a step, so that three steps measure each of them once."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "dots_rewards_by_level.py").write_text(REWARDS)
    place = Place.at(tmp_path, monkeypatch, capsys)
    place.config(change)
    rows = [
        {"id": f"p{i}", "question": f"{i} {HOSTILE}", "answer": str(i), "level": level, "data_source": f"set{i % 2}",
         "extra": {"rank": i}, "source": "web"}
        for i, level in enumerate(LEVELS)
    ]  # fmt: skip
    write_pool(tmp_path / "pool.jsonl", rows)
    write_pool(tmp_path / "val.jsonl", [row | {"id": f"v{i}", "question": f"v{i}"} for i, row in enumerate(rows)])
    return place


def change(config: dict[str, Any]) -> None:
    config["trainer"]["callbacks"] = []
    function = {"path": "dots_rewards_by_level.by_level", "correctness": True}
    model(config)["rewards"] = [{"class_path": "app.rewards.Function", "init_args": function}]
    data(config)["val"] = {"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": "val.jsonl"}}
    data(config)["selector"] = {"class_path": "datamodules.selectors.Uniform"}


def table(file: Path) -> pd.DataFrame:
    return pq.read_table(file).to_pandas()


def test_a_run_leaves_a_look_into_its_pool(place: Place) -> None:
    code, said = place.run(*FIT)
    assert code == 0, said
    prompts = table(RUN / "prompts.parquet")
    assert list(prompts["index"]) == list(range(6)) and list(prompts["prompt_id"]) == [f"p{i}" for i in range(6)]
    assert list(prompts["answer"]) == [str(i) for i in range(6)]
    assert list(prompts["task"]) == ["set0", "set1"] * 3
    assert list(prompts["mean_success"]) == list(prompts["last_success"]) == [SUCCESS[level] for level in LEVELS]
    assert list(prompts["times_chosen"]) == list(prompts["times_measured"]) == [1] * 6
    assert prompts["forecast"].isna().all() and prompts["forecast_deviation"].isna().all()
    assert prompts["question"][2] == f"2 {HOSTILE}"

    rows = pd.concat([table(RUN / "completions" / f"step_{step:08d}.parquet") for step in range(3)])
    assert dict(zip(rows["prompt_id"], rows["step"], strict=True)) == dict(
        zip(prompts["prompt_id"], prompts["last_chosen_step"].astype(int), strict=True)
    )
    row = rows[rows["prompt_id"] == "p4"].iloc[0]
    assert (row["answer"], row["task"], row["level"], row["extra"]) == ("4", "set0", "hard", '{"rank": 4}')
    assert (row["source"], row["data/source"]) == ("fresh", "web")
    assert row["forecast"] is None or pd.isna(row["forecast"])
    val = table(RUN / "completions" / "val_00000000.parquet")
    assert list(val["prompt_id"].unique()) == [f"v{i}" for i in range(6)] and list(val["answer"][::2]) == list("012345")

    # The tab of texts shows a completion of each of four prompts, wrong ones first, with the answer.
    events = EventAccumulator(str(RUN))
    events.Reload()
    text = events.Tensors("completions/val/text_summary")[0].tensor_proto.string_val[0].decode()
    assert re.findall(r"result (\w+)", text) == ["wrong"] * 4
    assert re.findall(r"answer (\d)", text) == ["1", "2", "4", "5"]

    page = (RUN / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; $x_1$" in page
    lists = page[page.index("Hardest prompts") : page.index("Forecast against outcome")]
    hardest, easiest = lists.split("Easiest prompts")
    assert re.findall(r"<b>(\d+%)</b>", hardest) == ["0%", "0%", "50%", "50%", "100%", "100%"]
    assert re.findall(r"<b>(\d+%)</b>", easiest) == ["100%", "100%", "50%", "50%", "0%", "0%"]
    assert re.findall(r'class="(wrong|right)"', hardest) == ["wrong"] * 4 + ["right"] * 2
    counts = re.findall(r"<tr><td>(\w+ \w+)</td><td>([\d,]+)</td>", page)
    assert dict(counts) == {"never measured": "0", "always wrong": "2", "sometimes right": "2", "always right": "2"}
    assert len(page) < 500_000

    with browser() as window:
        window.open((place.path / RUN / "report.html").as_uri())
        assert window.requests() == [(place.path / RUN / "report.html").as_uri()] and window.errors() == []
        assert window.run("return document.querySelectorAll('svg g path').length") > 20
        assert window.run("return document.body.scrollWidth <= window.innerWidth")


@pytest.mark.long
def test_a_stopped_and_resumed_run_has_the_history_of_one_that_was_not(place: Place) -> None:
    assert place.run(*FIT)[0] == 0
    expected = table(RUN / "prompts.parquet")
    assert place.run(*FIT, "--trainer.max_steps=2", "--trainer.logger.name=other", "--checkpoint.every=1")[0] == 0
    other = Path("runs/other/version_0")
    assert not table(other / "prompts.parquet").equals(expected)
    assert place.run(*FIT, "--trainer.logger.name=other", "--ckpt_path=last")[0] == 0
    assert table(other / "prompts.parquet").equals(expected)


@pytest.mark.long
def test_the_page_of_a_run_without_its_tables(place: Place) -> None:
    """A run that was killed, or one of an earlier version."""
    assert place.run(*FIT, "--trainer.max_steps=1")[0] == 0
    assert not (RUN / "report.html").exists() and not (RUN / "prompts.parquet").exists()  # of a single step
    (RUN / "summary.json").unlink()
    code, out, said = place.run_with_output("report", str(RUN))
    assert code == 0, said
    assert out.strip().endswith(f"report: {RUN / 'report.html'}")
    page = (RUN / "report.html").read_text()
    assert "the run did not end in order" in page and "Hardest prompts" in page
    for file in (RUN / "completions").iterdir():
        file.unlink()
    assert "No prompt was measured" in write_report(RUN).read_text()
    for given in ("nothing", "pool.jsonl", "runs"):
        assert "has no metrics of a run" in place.refused("report", given)


@pytest.mark.long
def test_a_report_that_fails_costs_nothing_of_the_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("callbacks.watching.run_report.write_report", broken)
    with pytest.warns(UserWarning, match=r"The report of the run cannot be written \(OSError: .*No space left"):
        assert place.run(*FIT, "--trainer.max_steps=2")[0] == 0
    assert json.loads((RUN / "summary.json").read_text())["completed"] is True


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_what_was_measured_is_said_and_kept(place: Place, command: str) -> None:
    if command == "validate":
        assert place.run(*FIT, "--trainer.max_steps=1", "--checkpoint.every=1")[0] == 0
    checkpoint = RUN / "checkpoints" / "last.ckpt"
    given = ("--ckpt_path", str(checkpoint)) if command == "validate" else ()
    code, out, said = place.run_with_output(command, "--config", "run.yaml", "--trainer.logger.name=other", *given)
    assert code == 0, said
    folder = Path("runs/other/version_0")
    results = json.loads((folder / "results.json").read_text())
    assert results["command"] == command and results["prompts"] == 6
    (measured,) = results["sets"].values()
    assert "val.jsonl" in measured["data"] and measured["sampling"]["num_generations"] == 2
    policy = model(yaml.safe_load(Path("run.yaml").read_text()))["policy"]["path"]
    assert results["policy"] == policy
    if given:
        newest = str((place.path / RUN / "checkpoints" / "step_00000001.ckpt").resolve())
        assert results["checkpoint"] == newest and f"measured: the policy {policy} with the weights of {newest}" in out
    else:
        assert results["checkpoint"] is None
        assert f"measured: the policy {policy} itself, since no --ckpt_path was given, on 6 prompts" in out
    accuracy = {"validate": "val/accuracy", "test": "test/accuracy", "predict": "mean_success"}[command]
    assert results["metrics"][accuracy] == 0.5
    assert "mean success 0.500" in out
    assert f"results: {folder / 'results.json'}" in out
    file = folder / "completions" / f"{command}.parquet"
    assert f"completions: {file}" in out
    last = [line.partition(":")[0] for line in out.splitlines() if line][-4:]  # after the progress bar
    assert last == ["measured", "results", "completions", "run folder"]
    rows = table(file)
    assert len(rows) == 12 and list(rows["answer"][::2]) == list("012345") and list(rows["level"][::2]) == LEVELS
