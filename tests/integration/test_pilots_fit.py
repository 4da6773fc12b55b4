"""Runs with pilots: stopped and resumed, with all that may stand beside them, and of two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.command import dots, dots_on_ranks, fit_arguments, logged, run_of, scalars
from tests.support.refusal import Place, data, model

pytestmark = pytest.mark.slow

REWARDS = """
import re

def parity(prompts, completion_ids, **rest):  # every other prompt is hopeless
    numbers = [int(re.search(r"\\d+", prompt).group()) for prompt in prompts]
    return [float(sum(ids) % 2) * (number % 2) for number, ids in zip(numbers, completion_ids)]
"""


def with_pilots(config: dict[str, Any]) -> None:
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.Pilots", "init_args": {"n_init": 2}},
        {"class_path": "callbacks.ReferenceRollouts", "init_args": {"size": 3, "every": 2}},
        {"class_path": "callbacks.DynamicSampling", "init_args": {"max_refills": 2}},
        {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 4}},
        {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1}},
    ]
    model(config)["rewards"] = "my_rewards.parity"
    model(config)["sampling"] = {"num_generations": 4, "max_completion_length": 3}
    options = {"use_embeddings": False, "temperature": 0.3}
    data(config)["selector"] = {"class_path": "datamodules.selectors.Posterior", "init_args": options}
    data(config)["prompts_per_step"] = 3


def with_pilots_ahead(config: dict[str, Any]) -> None:
    with_pilots(config)
    config["trainer"]["callbacks"][0]["init_args"]["ahead"] = True
    config["trainer"]["callbacks"][-1]["init_args"]["keep"] = 5


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    found = Place.at(tmp_path, monkeypatch, capsys)
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    found.config(with_pilots)
    return found


def test_a_run_resumed_between_pilots_and_groups_is_the_run_that_was_not_stopped(place: Place) -> None:
    place.config(with_pilots_ahead)
    whole, expected = place.fit("whole", 5)
    saved = whole / "checkpoints" / "step_00000003.ckpt"
    held = torch.load(saved, weights_only=True)["callbacks"]
    (key,) = (name for name in held if "Pilots" in name)
    prompts = held[key]["prepared"]["prompts"]
    assert held[key]["prepared"]["step"] == 3 and prompts
    again, found = place.fit("again", 5, "--ckpt_path", str(saved))
    ours, others = logged(again), logged(whole)
    assert {tag: values for tag, values in ours.items() if 3 in values} == {
        tag: {step: value for step, value in others[tag].items() if step in ours[tag]} for tag in ours if 3 in ours[tag]
    }
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    assert found["callbacks"][key] == expected["callbacks"][key]
    # Without the option the prompts are rolled out again, when their step begins.
    place.config(with_pilots)
    other, _ = place.fit("other", 5, "--ckpt_path", str(saved))
    assert (
        logged(other)["sampling/sampling_logp_difference/mean"][3] < ours["sampling/sampling_logp_difference/mean"][3]
    )


def test_a_resumed_run_completes_the_groups_of_one_that_was_not_stopped(place: Place) -> None:
    whole, expected = place.fit("whole", 5)
    place.fit("cut", 3)
    cut, found = place.fit("cut", 5, "--ckpt_path", "last")
    assert logged(cut) == logged(whole)
    assert all(torch.equal(tensor, found["state_dict"][name]) for name, tensor in expected["state_dict"].items())
    (key,) = (name for name in expected["callbacks"] if "Pilots" in name)
    assert found["callbacks"][key] == expected["callbacks"][key]
    summary = json.loads((whole / "summary.json").read_text())
    thresholds = logged(whole)["pilot/threshold"]
    assert all(0 < one < 1 for one in thresholds.values())  # of the last refill, even in the first step
    saved = logged(whole)["pilot/saved_completions"]
    assert summary["saved_completions"] == sum(saved.values())
    assert summary["completions"] == 4 * summary["prompts_rolled_out"] - summary["saved_completions"]
    assert summary["informative_fraction"] > 0.5


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("ahead", [False, True])
def test_two_processes_complete_the_same_groups_as_one(tmp_path: Path, ahead: bool) -> None:
    options = {"n_init": 2, "rule": "informative", "ahead": ahead}
    pilots = json.dumps({"class_path": "callbacks.Pilots", "init_args": options})
    more = (f"--trainer.callbacks+={pilots}", "--trainer.max_steps=4", "--trainer.limit_val_batches=0")
    done = [dots(*fit_arguments(tmp_path / "one", *more))]
    done += dots_on_ranks(
        2, *fit_arguments(tmp_path / "two", "--config", "configs/strategy/ddp.yaml", "--trainer.devices=2", *more)
    )
    for one in done:
        assert one.returncode == 0, one.stderr[-2000:]
    ours, others = scalars(tmp_path / "two"), scalars(tmp_path / "one")
    for tag in others:
        if tag.startswith(("pilot/", "selection/", "reward", "num_")):
            assert ours[tag] == pytest.approx(others[tag]), tag
    assert sum(others["pilot/saved_completions"].values()) > 0
    assert json.loads((run_of(tmp_path / "two") / "summary.json").read_text())["saved_completions"] > 0
