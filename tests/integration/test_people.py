"""What people do first that no other file tries: functions from Python, help, answers that contradict."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from app.cli import DotsTrainer
from app.module import GRPOModule
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts import PromptFile
from tests.support.command import logged
from tests.support.refusal import TINY, Place, write_pool


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capfd)


def test_a_function_from_python_scores_and_above_a_half_is_right(place: Place) -> None:
    """A function that no module holds reaches the workers; of two scores, the accuracy counts the one above 0.5."""

    def halves(completions: list[str], answer: list[str], **_: object) -> list[float]:
        return [0.6 if int(one) % 2 else 0.5 for one in answer]

    write_pool(place.path / "val.jsonl", [{"question": f"{n} + 9 =", "answer": str(n + 9)} for n in range(4)])
    module = GRPOModule(policy=str(TINY), rewards=[halves], sampling={"num_generations": 2, "max_completion_length": 3})
    data = OnlinePromptDataModule(
        PromptFile("pool.jsonl"), val=PromptFile("val.jsonl"), prompts_per_step=2, cache_dir="cache"
    )
    DotsTrainer(max_steps=1, accelerator="cpu", devices=1).fit(module, datamodule=data)
    found = logged(place.path / "lightning_logs" / "version_0")
    assert set(found["val/accuracy"].values()) == {0.5}
    assert found["val/reward"][0] == pytest.approx(0.55)


def test_help_shows_own_options_first(place: Place) -> None:
    code, out, _ = place.run_with_output("fit", "--help")
    assert code == 0
    own = [out.index(one) for one in ("--model.policy.path", "--data.train.path", "--checkpoint.every")]
    assert max(own) < out.index("--trainer.max_steps") and "--dry_run" in out and "--resume" in out
    code, out, _ = place.run_with_output("export", "--help")
    assert code == 0 and "--out" in out and "--adapter" in out and "--export." not in out


def test_prompts_with_several_answers_are_counted(place: Place) -> None:
    rows = [{"question": f"{n % 6} + 1 =", "answer": str(n)} for n in range(9)]  # three of them twice
    write_pool(place.path / "pool.jsonl", rows)
    code, out, said = place.run_with_output("data", "--config", "run.yaml")
    assert code == 0, said
    assert "9 rows read, 9 prompts kept, 3 with several different answers (all kept)" in out


def test_callbacks_by_short_names(place: Place) -> None:
    given = ("--trainer.callbacks+=ReferenceRollouts", "--trainer.callbacks.size=4", "--data.selector=Dots")
    code, out, said = place.run_with_output("fit", "--config", "run.yaml", *given, "--print_config")
    assert code == 0, said
    listed = yaml.safe_load(out)["trainer"]["callbacks"]
    assert listed[-1]["class_path"] == "callbacks.ReferenceRollouts" and listed[-1]["init_args"]["size"] == 4
