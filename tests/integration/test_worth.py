"""`dots worth`: its estimate of a gain against whole distributions, and the command as it is typed."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from app.cli.entry import main
from app.studies.worth.command import read_plan, worth_parser
from app.studies.worth.measure import HeldOut, stepped
from app.studies.worth.report import table_of
from datamodules.errors import UserError
from datamodules.types import Prompt
from tests.support.command import ROOT
from tests.support.policies import group_of, module_on, tiny_model

VOCABULARY = 5


def test_the_gain_is_that_of_the_whole_distribution() -> None:
    """Completions of one token, drawn as often as the policy makes them: the estimate is the exact change."""
    model = tiny_model(VOCABULARY, seed=1, spread=1.0)
    module, prompt = module_on(model), Prompt("p", 0, "", "", (3, 4, 2), {})
    rewards = torch.tensor([0.0, 1, 0, 1, 0])

    def distribution() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([[3, 4, 2]])).logits[0, -1].softmax(-1)

    before, size = distribution(), 4000
    counts = (before * size).round().int().tolist()
    drawn = np.repeat(np.arange(VOCABULARY), counts)
    logprobs = [np.array([float(before[token].log())]) for token in drawn]
    several = group_of(prompt, [(int(one),) for one in drawn], logprobs, rewards[drawn].tolist(), "fresh")
    solved = group_of(prompt, [(1,), (3,)], [np.zeros(1)] * 2, [1.0, 1.0], "fresh")
    walker: Any = SimpleNamespace(
        module=module, precision=contextlib.nullcontext, parameters=list(model.parameters()),
        load=lambda weights: [one.data.copy_(new) for one, new in zip(model.parameters(), weights, strict=True)],
    )  # fmt: skip
    held_out = HeldOut(walker, [several, solved])
    assert held_out.gain() == 0
    start = [one.detach().clone() for one in model.parameters()]
    torch.manual_seed(0)
    stepped(walker, start, 0.05 * torch.randn(sum(one.numel() for one in start), dtype=torch.float64))
    exact = float((distribution() - before) @ rewards.double())
    assert abs(exact) > 0.01
    # Two prompts, of which the solved one has no gain that its completions could show; counts are rounded.
    assert held_out.gain() == pytest.approx(exact / 2, abs=3 / size)


def cell(seed: int, gains: list[tuple[float, float, float]]) -> dict[str, Any]:
    names = ("fresh", "with_replayed", "with_fresh")
    row = {
        "uses": 1, "age": 2, "groups": 3, "drift": 0.1, "effective": 0.9, "adam": [1.0, 4.0], "sketch": [seed, 2.0],
        "gains": [{name: [value] for name, value in zip(names, one, strict=True)} for one in gains],
    }  # fmt: skip
    cost = {"rollout_seconds": 8.0, "update_seconds": 2.0, "tokens": 100.0, "fresh": 8, "informative": 4, "updated": 4}
    return {"learning_rate": 1e-4, "uses": 1, "seed": seed, "success": 0.5, "rows": [row], "cost": cost}


def test_figures_are_pooled_over_seeds() -> None:
    cells = [cell(0, [(0.01, 0.02, 0.05), (0.03, 0.05, 0.05)]), cell(1, [(0.02, 0.02, 0.04), (0.02, 0.02, 0.04)])]
    (row,) = table_of(cells, 0.0).to_dict("records")
    # Added by replayed groups: 0.015 and 0; by fresh ones: 0.03 and 0.02.
    assert row["worth"] == pytest.approx(0.015 / 0.05) and row["gradients"] == 0.25 and row["sketches"] == 1 / 4
    # Jackknife over two seeds: 0 / 0.02 and 0.015 / 0.03.
    assert row["worth_error"] == pytest.approx(0.25)
    # c_g = 1, c_u = 0.5, y = 0.5.
    assert row["threshold"] == pytest.approx(0.25 / 1.25)
    # 0.04 s for each of 200 tokens of 16 groups make c_g = 1.5.
    assert table_of(cells, 0.04)["threshold"][0] == pytest.approx(0.25 / 1.75)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--ages", "0"], "--ages is 0, expected 1 or more"),
        (["--ages", "2", "2"], "--ages is 2 2, with a number twice"),
        (["--ages", "1", "--uses", "2"], "--uses has 2, but a group of age 1"),
        (["--learning_rates", "0"], "--learning_rates has a 0"),
        (["--seconds_per_token", "-1"], "--seconds_per_token is -1.0, expected 0.0 or more"),
    ],
)
def test_impossible_options_are_refused(given: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_plan(worth_parser().parse_args(["--base", "a.yaml", "--out", "b", *given]))


def test_the_command_measures_writes_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["dots"])
    (tmp_path / "small.yaml").write_text(
        "model: {init_args: {sampling: {max_completion_length: 48}, mini_batches: 1}}\n"
        "data: {init_args: {prompts_per_step: 8, val_size: 12, train: {class_path: datamodules.procedural.Procedural, "
        'init_args: {template: "{question}\\n", tasks: [{name: chain_sum, size: 90, '
        "params: {min_terms: 3, max_terms: 6, min_digits: 1, max_digits: 1}}]}}}}\n"
    )
    out = tmp_path / "out"
    given = ["worth", "--base", "configs/quickstart.yaml", str(tmp_path / "small.yaml"), "--out", str(out)]
    given += ["--ages", "1", "--uses", "0", "1", "--learning_rates", "1e-3", "--groups", "2", "--draws", "2"]
    given += ["--prompts", "24", "--held_out", "12"]
    main([*given, "--seeds", "0"])
    first = json.loads((out / "worth.json").read_text())
    assert [(row["uses"], row["age"]) for row in first["rows"]] == [(0, 1), (1, 1)]
    assert (out / "worth.png").read_bytes()[:4] == b"\x89PNG" and (out / "worth.csv").is_file()
    (measured,) = first["cells"]
    unused, used = measured["rows"]
    # The group that no update has seen agrees with the policy that made it better than one that an update has used.
    assert 0 <= unused["drift"] < used["drift"]
    assert used["gains"][0]["fresh"] == unused["gains"][0]["fresh"] and used["adam"][1] == unused["adam"][1] != 0
    assert 0 < first["rows"][0]["threshold"] < 1
    # The same command measures nothing again, and one seed more is that seed alone.
    capsys.readouterr()
    main([*given, "--seeds", "0", "--seconds_per_token", "1"])
    said = capsys.readouterr().out
    assert "1 of 1" not in said and "learning rate" in said
    again = json.loads((out / "worth.json").read_text())
    assert again["cells"] == first["cells"] and again["rows"][0]["threshold"] < 0.01
    with pytest.raises(SystemExit) as refused:
        main([*given, "--seeds", "0", "--draws", "3"])
    assert refused.value.code == 2
    assert "holds measurements made with another draws" in capsys.readouterr().err
