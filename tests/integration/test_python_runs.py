"""The examples of docs/python.md run as they are written, and are the runs of the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from app.cli import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule
from app.policy.model import Policy
from app.rewards import Numeric
from callbacks import CompletionsLog, RolloutReplay, RunCheckpoint
from callbacks.standard import STANDARD
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from tests.support.command import ROOT, dots

EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
CONFIG = """
seed_everything: 0
trainer: {max_steps: 2}
model:
  class_path: app.module.GRPOModule
  init_args:
    policy: {path: configs/tiny_policy}
    rewards: [{class_path: app.rewards.Numeric}]
data:
  class_path: datamodules.online.OnlinePromptDataModule
  init_args:
    prompts_per_step: 8
    train: {class_path: datamodules.prompts.PromptFile, init_args: {path: my_prompts.jsonl}}
"""
DOTS_RR = """
trainer:
  callbacks:
    - {class_path: callbacks.ReferenceRollouts, init_args: {size: 16, every: 2}}
    - {class_path: callbacks.RolloutReplay, init_args: {fresh_fraction: 0.5, capacity: 32}}
data:
  init_args:
    selector: {class_path: datamodules.selectors.Dots}
"""


def prepared(folder: Path) -> Path:
    """Return a working folder with the files that the examples name."""
    folder.mkdir()
    (folder / "configs").symlink_to(ROOT / "configs")
    asked = "State the final answer to the following arithmetic problem: {} + {} =\n"  # as it was pretrained
    rows = [{"question": asked.format(i % 7, i // 7), "answer": str(i % 7 + i // 7)} for i in range(40)]
    (folder / "my_prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = folder / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("overlay", ["", DOTS_RR], ids=["grpo", "dots_rr"])
def test_an_example_is_the_run_of_the_command_line(tmp_path: Path, overlay: str) -> None:
    script, command = prepared(tmp_path / "script"), prepared(tmp_path / "command")
    (script / "run.py").write_text(EXAMPLES[bool(overlay)])
    assert len(EXAMPLES[0].strip().replace("\n\n", "\n").splitlines()) <= 10
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "run.py"], cwd=script, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (command / "run.yaml").write_text(CONFIG)
    (command / "overlay.yaml").write_text(overlay or "{}")
    same = dots("fit", "--config", "run.yaml", "--config", "overlay.yaml", cwd=command, path=ROOT)
    assert same.returncode == 0, same.stderr[-2000:]
    found, expected = weights(script), weights(command)
    assert list(found) == list(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    accounts = [json.loads(next(folder.rglob("summary.json")).read_text()) for folder in (script, command)]
    assert accounts[0]["completed"] and accounts[0]["steps"] == 2
    assert accounts[0]["completion_tokens"] == accounts[1]["completion_tokens"] > 0


def kinds(trainer: DotsTrainer) -> list[type]:
    return [type(one) for one in trainer.callbacks]  # type: ignore[attr-defined]


def test_standard_callbacks_are_added_once_and_sorted() -> None:
    options = {"accelerator": "cpu", "logger": False}
    assert sorted(map(str, kinds(DotsTrainer(**options)))) == sorted(map(str, STANDARD))
    trainer = DotsTrainer(**options, callbacks=[RunCheckpoint(every=3), RolloutReplay(), CompletionsLog(every=7)])
    found = kinds(trainer)
    assert len(found) == len(STANDARD) + 1
    names = [kind.__name__ for kind in found]
    places = [names.index(name) for name in ("WeightSync", "Rollouts", "RolloutReplay", "CompletionsLog", "RunLedger")]
    assert places == sorted(places) and names[-1] == "RunCheckpoint"
    listed = {type(one): one for one in trainer.callbacks}  # type: ignore[attr-defined]
    assert listed[RunCheckpoint].every == 3 and listed[CompletionsLog].every == 7


def test_a_subclass_replaces_the_standard_callback() -> None:
    class Own(CompletionsLog):
        pass

    found = kinds(DotsTrainer(accelerator="cpu", logger=False, callbacks=Own()))
    assert Own in found and CompletionsLog not in found


def test_lightnings_switches_leave_callbacks_out() -> None:
    names = {
        kind.__name__
        for kind in kinds(
            DotsTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        )
    }
    assert not names & {"RunCheckpoint", "RunProgress", ModelCheckpoint.__name__, "RichProgressBar", "TQDMProgressBar"}
    assert "RunLedger" in names


def test_every_stage_runs_before_and_after_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared(tmp_path / "here"))
    module = GRPOModule(Policy("configs/tiny_policy"), rewards=[Numeric()], sampling=Sampling(2, 4))
    data = OnlinePromptDataModule(PromptFile("my_prompts.jsonl"), prompts_per_step=2, val_size=2, cache_dir="cache")
    trainer = DotsTrainer(max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.validate(module, datamodule=data)
    before = {name: one.clone() for name, one in module.state_dict().items()}
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == 2
    trainer.validate(module, datamodule=data)
    trainer.test(module, datamodule=data)
    assert len(trainer.predict(module, datamodule=data)) == 1  # type: ignore[arg-type]
    assert before.keys() == module.state_dict().keys()
