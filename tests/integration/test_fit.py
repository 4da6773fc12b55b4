"""The real command, end to end, on the embedded policy: training, resuming, plain GRPO, prediction, export."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.reporting.curves import read_scalars
from tests.support.command import EVERY_STEP, assert_same_run, dots, fit_arguments, kill_when, run_of, scalars


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten steps; most tests only look at what it left."""
    folder = tmp_path_factory.mktemp("finished")
    done = dots(*fit_arguments(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "prompts per step" in done.stdout
    return folder


pytestmark = pytest.mark.slow


def test_a_run_leaves_its_account(finished: Path):
    run = finished / "quickstart" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["completed"] is True
    assert summary["steps"] == 10
    assert (run / "curves.png").stat().st_size > 10_000
    curves = scalars(finished)
    # Every batch has 8 groups: fresh, offered by the reference set, or replayed.
    replayed = sum(round(8 * fraction) for fraction in curves["replay/fraction"].values())
    assert summary["replayed_groups"] == replayed > 0
    assert summary["prompts_rolled_out"] <= 80 - replayed
    assert summary["completions"] == 8 * summary["prompts_rolled_out"]
    assert summary["reference"]["prompts"] > 0
    assert summary["validation"]["prompts"] == 3 * 16
    assert sorted(curves["val/accuracy"]) == [0, 4, 9]
    assert summary["val"]["first"] == pytest.approx(curves["val/accuracy"][0])
    spent = sum(value for phase, value in summary["seconds"].items() if phase != "total")
    assert 0.5 * summary["seconds"]["total"] < spent <= summary["seconds"]["total"]


def test_every_evaluation_says_what_had_been_spent(finished: Path):
    run = finished / "quickstart" / "version_0"
    summary, curves = json.loads((run / "summary.json").read_text()), read_scalars(run)
    evaluations = summary["evaluations"]
    assert [one["step"] for one in evaluations] == [0, 5, 10]
    assert [one["accuracy"] for one in evaluations] == pytest.approx(curves["val/accuracy"][1])
    reference = summary["reference"]
    assert evaluations[-1]["completions"] == summary["completions"] + reference["completions"]
    assert evaluations[-1]["completion_tokens"] == summary["completion_tokens"] + reference["tokens"]
    # Before the first step only the first reference set had been rolled out, and its time belongs to that step.
    assert evaluations[0]["seconds"] == 0
    assert [one["completions"] for one in evaluations[1:]] == [curves["num_completions"][1][step] for step in (4, 9)]
    clock, steps = curves["time/training"][1], curves["step_time"][1]
    assert clock == pytest.approx([sum(steps[: n + 1]) for n in range(10)], rel=1e-4)
    assert summary["training_seconds"] == pytest.approx(clock[-1], rel=1e-3)
    phases = sum(summary["seconds"][name] for name in ("select", "rollout", "reference", "reward", "update", "sync"))
    assert phases <= summary["training_seconds"] < summary["seconds"]["total"] - summary["seconds"]["validate"]


@pytest.mark.long
def test_a_run_killed_behind_its_last_checkpoint_still_gets_its_account(finished: Path, tmp_path: Path):
    shutil.copytree(finished / "quickstart", tmp_path / "quickstart", symlinks=True)
    summary = run_of(tmp_path) / "summary.json"
    expected = json.loads(summary.read_text())
    summary.unlink()
    done = dots(*fit_arguments(tmp_path), "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(summary.read_text())
    assert found["completed"] is True
    for name in ("steps", "evaluations", "training_seconds", "completions", "reference", "validation_prompts"):
        assert found[name] == expected[name], name


@pytest.mark.long
def test_a_run_whose_clock_has_passed_takes_no_further_step(finished: Path, tmp_path: Path):
    shutil.copytree(finished / "quickstart", tmp_path / "quickstart", symlinks=True)
    summary = run_of(tmp_path) / "summary.json"
    summary.unlink()
    budget = '{"class_path": "callbacks.ClockBudget", "init_args": {"seconds": 0.001}}'
    more = ["--trainer.max_steps=20", f"--trainer.callbacks+={budget}"]
    done = dots(*fit_arguments(tmp_path), *more, "--ckpt_path", "last")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(summary.read_text())
    assert found["completed"] is True
    assert found["steps"] == 10


def test_metrics_carry_the_usual_names(finished: Path):
    curves = scalars(finished)
    for name in (
        "reward",
        "reward_std",
        "frac_reward_zero_std",
        "rewards/procedural/mean",
        "completions/mean_length",
        "completions/clipped_ratio",
        "entropy",
        "clip_ratio/region_mean",
        "sampling/importance_sampling_ratio/mean",
        "sampling/sampling_logp_difference/max",
        "num_tokens",
        "grad_norm",
        "learning_rate",
        "selection/informative_fraction",
        "selection/mean_success",
        "selection/distinct_fraction",
        "selection/forecast_brier",
        "replay/size",
        "replay/age_mean",
        "val/pass@4",
    ):
        assert curves[name], name
        assert all(math.isfinite(value) for value in curves[name].values()), name
    # The engine samples from the policy that is trained: before any replay the two agree on every token.
    assert curves["sampling/sampling_logp_difference/max"][0] < 1e-3


def test_completions_can_be_read(finished: Path):
    run = finished / "quickstart" / "version_0"
    rows = pq.read_table(run / "completions" / "step_00000000.parquet").to_pylist()
    assert len(rows) == 64
    by_prompt: dict[str, list[dict]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    for group in by_prompt.values():
        # Advantages are centred within a group.
        assert sum(row["advantage"] for row in group) == pytest.approx(0, abs=1e-4)
    right = [row for row in rows if row["correctness"] == 1]
    assert right
    assert all("####" in row["completion"] for row in right)


def test_the_checkpoint_loads_without_pickle_and_holds_everything(finished: Path):
    path = finished / "quickstart" / "version_0" / "checkpoints" / "last.ckpt"
    state = torch.load(path, weights_only=True)
    assert state["global_step"] == 10
    assert state["optimizer_states"][0]["state"]
    assert state["lr_schedulers"]
    assert "selector" in state["OnlinePromptDataModule"]
    assert state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["step"] == 10
    assert state["callbacks"]["RolloutReplay"]["prompt_ids"]
    assert len(state["callbacks"]["RandomState"]["torch"])


@pytest.mark.long
def test_a_killed_run_goes_on_as_if_never_stopped(finished: Path, tmp_path: Path):
    arguments = fit_arguments(tmp_path, EVERY_STEP)
    run = run_of(tmp_path)
    kill_when(run / "checkpoints" / "step_00000007.ckpt", *arguments)
    assert not (run / "summary.json").exists()
    done = dots(*arguments, "--ckpt_path", "last", fresh=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not run.with_name("version_1").exists()
    assert_same_run(tmp_path, finished)

    def spent(folder: Path) -> list[dict]:
        evaluations = json.loads((run_of(folder) / "summary.json").read_text())["evaluations"]
        return [{name: value for name, value in one.items() if name != "seconds"} for one in evaluations]

    assert spent(tmp_path) == spent(finished)


@pytest.mark.long
def test_without_selection_and_replay_it_is_plain_grpo(tmp_path: Path):
    done = dots(*fit_arguments(tmp_path, "--config", "configs/arms/grpo.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads((tmp_path / "quickstart" / "version_0" / "summary.json").read_text())
    assert summary["prompts_rolled_out"] == 80
    assert summary["replayed_groups"] == summary["reference"]["prompts"] == summary["discarded_groups"] == 0
    curves = scalars(tmp_path)
    assert not any(tag.startswith("replay/") for tag in curves)
    # On policy, one update per batch: nothing is clipped and every ratio is 1.
    assert set(curves["clip_ratio/region_mean"].values()) == {0.0}
    assert curves["policy/ratio_mean"][9] == pytest.approx(1.0)
    ratios = curves["sampling/importance_sampling_ratio/mean"].values()
    assert all(ratio == pytest.approx(1.0, abs=1e-4) for ratio in ratios)


def test_the_policy_is_exported_and_predicts(finished: Path, tmp_path: Path):
    run = finished / "quickstart" / "version_0"
    out = tmp_path / "policy"
    done = dots("export", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(out)
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained[f"policy_model.{name}"])
    assert AutoTokenizer.from_pretrained(out)("8 + 3").input_ids

    done = dots("predict", "--config", str(run / "config.yaml"), "--trainer.logger.name", "predicted", "--ckpt_path",
                str(run / "checkpoints" / "last.ckpt"))  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = pq.read_table(finished / "predicted" / "version_0" / "completions" / "predict.parquet").to_pylist()
    assert len(rows) == 16 * 4
    # The same policy, prompts and seeds as the last validation of the run.
    accuracy = sum(row["correctness"] for row in rows) / len(rows)
    assert accuracy == pytest.approx(scalars(finished)["val/accuracy"][9], abs=1e-6)


def test_an_unknown_run_cannot_be_measured(tmp_path: Path):
    done = dots("validate", *fit_arguments(tmp_path)[1:], "--ckpt_path", "last")
    assert done.returncode == 2
    assert "no run under" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "quickstart").exists()
