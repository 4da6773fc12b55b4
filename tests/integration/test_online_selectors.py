"""Every online selector trains from the command line by its short name, and a stopped run goes on with its choices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cli.dots import main
from datamodules import selectors
from tests.support.command import dots, fit_arguments, last_checkpoint, run_of, scalars

OWN_METRICS = {
    "Uniform": "selection/pool_epoch",
    "Dots": "difficulty/forecast_mean",
    "Greso": "selection/p_easy",
    "Mopps": "selection/posterior_mean",
    "Dps": "selection/belief_partly",
    "Pools": "selection/normal_fraction",
    "Posterior": "selection/posterior_mean",
    "Aligned": "selection/pool_share",
}
SHORT = [
    "--trainer.limit_val_batches=0",
    "--data.prompts_per_step=6",
    "--model.sampling.max_completion_length=40",
]
COMPOSED = [
    "--data.selector=Composed",
    "--data.selector.ranker=Dps",
    "--data.selector.ranker.decay=0.95",
    "--data.selector.filters+=ZeroVarianceSkip",
    "--data.selector.cool_down=2",
    "--data.selector.explore=0.25",
]


def test_every_method_is_named_here():
    methods = {name for name in selectors.__all__ if name not in ("Ranker", "SelectionContext", "Selector", "Filter")}
    assert methods == {*OWN_METRICS, "Composed", "ZeroVarianceSkip"}


def test_short_names_and_options_are_understood(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["dots"])
    given = ["--data.selector=Greso", "--data.selector.init_args.p_easy=0.4", "--data.selector.min_refill=8"]
    for options, expected in (
        (given, ["class_path: datamodules.selectors.Greso", "p_easy: 0.4", "min_refill: 8", "p_hard: 0.5"]),
        (COMPOSED, ["selectors.Composed", "selectors.Dps", "decay: 0.95", "- class_path: datamodules.selectors.Zero"]),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["fit", "--config", "configs/quickstart.yaml", *options, "--print_config"])
        printed = capsys.readouterr().out
        assert stopped.value.code == 0
        assert all(text in printed for text in expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name == "Posterior" else pytest.param(name, marks=pytest.mark.long) for name in OWN_METRICS],
)
def test_ten_steps_by_short_name(name: str, tmp_path: Path):
    done = dots(*fit_arguments(tmp_path, f"--data.selector={name}"), *SHORT)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((run_of(tmp_path) / "summary.json").read_text())
    assert summary["completed"] is True
    assert summary["steps"] == 10
    assert len(scalars(tmp_path)[OWN_METRICS[name]]) == 10


@pytest.mark.long
@pytest.mark.slow
def test_a_stopped_composition_goes_on_with_identical_choices(tmp_path: Path):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    runs = [
        (straight, []),
        (stopped, ["--trainer.max_steps=6"]),
        (stopped, ["--ckpt_path=last"]),
    ]
    for folder, more in runs:
        done = dots(*fit_arguments(folder), *SHORT, *COMPOSED, *more)
        assert done.returncode == 0, done.stderr[-2000:]
    curves = scalars(straight)
    assert curves["selection/explored_fraction"][9] > 0
    assert_same(selector_state(stopped), selector_state(straight))
    for tag in ("selection/belief_partly", "selection/p_easy", "selection/explored_fraction", "loss"):
        assert scalars(stopped)[tag] == curves[tag], tag


def selector_state(folder: Path) -> dict[str, Any]:
    """What the last checkpoint holds of the selector: among it, the step in which each prompt was last chosen."""
    state = last_checkpoint(folder)["OnlinePromptDataModule"]["selector"]
    assert state["steps"] == 10
    return state


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_same(found[name], expected[name])
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
