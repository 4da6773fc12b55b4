"""Runs with groups of unlike sizes: stopped and resumed, of two processes, and what their folders say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.command import dots, dots_on_ranks, fit_arguments, logged, run_of, scalars
from tests.support.refusal import Place, data, model

pytestmark = pytest.mark.slow

REWARDS = """
def parity(completion_ids, **rest): return [float(sum(ids) % 2) for ids in completion_ids]
"""


def with_sizes(config: dict[str, Any]) -> None:
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.GroupSizes", "init_args": {"smallest": 2, "largest": 12}},
        {"class_path": "callbacks.DynamicSampling", "init_args": {"max_refills": 1}},
        {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 4}},
        {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1}},
        {"class_path": "callbacks.CompletionsLog", "init_args": {"every": 1}},
    ]
    model(config)["rewards"] = "my_rewards.parity"
    model(config)["sampling"] = {"num_generations": 4, "max_completion_length": 3}
    options = {"use_embeddings": False, "temperature": 0.3}
    data(config)["selector"] = {"class_path": "datamodules.selectors.Posterior", "init_args": options}
    data(config)["prompts_per_step"] = 4


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    found = Place.at(tmp_path, monkeypatch, capsys)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    found.config(with_sizes)
    return found


def test_a_resumed_run_sizes_its_groups_as_one_that_was_not_stopped(place: Place) -> None:
    whole, expected = place.fit("whole", 4)
    place.fit("cut", 2)
    cut, found = place.fit("cut", 4, "--ckpt_path", "last")
    assert logged(cut) == logged(whole)
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["completions"] == 4 * summary["prompts_rolled_out"]
    measured = logged(whole)
    assert max(measured["group_size/max"].values()) > min(measured["group_size/min"].values())
    rows = pq.read_table(whole / "completions" / "step_00000003.parquet").to_pylist()
    sizes = Counter(row["prompt_id"] for row in rows)
    assert len(set(sizes.values())) > 1 and sum(sizes.values()) == len(rows)
    trained = {row["prompt_id"] for row in rows if row["advantage"] is not None}
    assert len({sizes[name] for name in trained}) > 1
    for name in trained:  # the differences of each group cancel, also where its size is not the mean
        assert sum(row["advantage"] for row in rows if row["prompt_id"] == name) == pytest.approx(0, abs=1e-5)


def test_a_selector_without_a_forecast_is_refused(place: Place) -> None:
    code, said = place.run("fit", "--config", "run.yaml", "--data.selector=datamodules.selectors.Uniform")
    assert code == 2 and "selectors.Uniform forecasts none. Set data.selector to one that does" in said


@pytest.mark.long
@pytest.mark.ranks
def test_two_processes_generate_the_same_groups_as_one(tmp_path: Path) -> None:
    sizes = json.dumps({"class_path": "callbacks.GroupSizes"})
    # Dots tells no prompts apart after references as few as those of these runs.
    more = (f"--trainer.callbacks+={sizes}", "--data.selector=Posterior", "--trainer.limit_val_batches=0")
    done = [dots(*fit_arguments(tmp_path / "one", *more))]
    done += dots_on_ranks(
        2, *fit_arguments(tmp_path / "two", "--config", "configs/strategy/ddp.yaml", "--trainer.devices=2", *more)
    )
    for one in done:
        assert one.returncode == 0, one.stderr[-2000:]
    ours, others = scalars(tmp_path / "two"), scalars(tmp_path / "one")
    for tag in others:
        if tag.startswith(("group_size/", "selection/", "reward", "num_", "grad_norm")):
            assert ours[tag] == pytest.approx(others[tag], rel=1e-4), tag
    assert max(others["group_size/max"].values()) > min(others["group_size/min"].values())
    assert json.loads((run_of(tmp_path / "two") / "summary.json").read_text())["completions"] > 0
