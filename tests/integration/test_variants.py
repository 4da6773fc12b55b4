"""Other ways to hold the policy, to score and to read data, each through the real command on a few steps."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.command import ROOT, dots, logged, run_of
from tests.support.tables import few

SMALL = [
    "--trainer.max_steps=2",
    "--model.mini_batches=1",
    "--trainer.val_check_interval=2",
    "--data.val_size=8",
    "--data.prompts_per_step=8",
    "--model.sampling.max_completion_length=48",
    "--model.val_sampling.max_completion_length=48",
]

pytestmark = pytest.mark.slow


def fit(folder: Path, *more: str) -> Path:
    """The run folder of two steps of plain GRPO on the quickstart's pool."""
    done = dots(
        "fit", "--config", "configs/quickstart.yaml", "--config", "configs/arms/grpo.yaml", *SMALL,
        f"--trainer.logger.save_dir={folder}", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return run_of(folder)


def state(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(tmp_path_factory.mktemp("plain"))


@pytest.mark.long
def test_gradient_checkpointing_changes_memory_only(plain: Path, tmp_path: Path):
    run = fit(tmp_path, "--model.policy.gradient_checkpointing=true")
    assert logged(run)["grad_norm"][0] > 0
    assert logged(run) == logged(plain)
    expected = state(plain)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state(run).items())


@pytest.mark.long
def test_lora_trains_its_matrices_alone_and_exports_merged_weights(tmp_path: Path):
    run = fit(tmp_path, "--model.policy.lora.rank=4", "--model.optimization.learning_rate=0.01")
    trained, initial = state(run), load_file(ROOT / "configs" / "tiny_policy" / "model.safetensors")
    query = "model.layers.0.self_attn.q_proj"
    prefix = f"policy_model.base_model.model.{query}"
    assert torch.equal(trained[f"{prefix}.base_layer.weight"], initial[f"{query}.weight"])
    up, down = trained[f"{prefix}.lora_B.default.weight"], trained[f"{prefix}.lora_A.default.weight"]
    assert up.abs().max() > 1e-3  # it starts at zero
    # The engine generates with the adapters: the second batch's behaviour is the trained policy's.
    assert logged(run)["sampling/sampling_logp_difference/max"][1] < 1e-3

    out = tmp_path / "policy"
    done = dots("export", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--out", str(out))
    assert done.returncode == 0, done.stderr[-2000:]
    exported = AutoModelForCausalLM.from_pretrained(out).state_dict()
    merged = initial[f"{query}.weight"] + 32.0 / 4 * (up @ down)
    assert torch.allclose(exported[f"{query}.weight"], merged, atol=1e-6)


@pytest.mark.long
def test_bf16_mixed_generates_and_learns_in_the_same_precision(plain: Path, tmp_path: Path):
    run = fit(tmp_path, "--trainer.precision=bf16-mixed")
    assert {tensor.dtype for tensor in state(run).values()} == {torch.float32}
    found = logged(run)
    assert found["grad_norm"][0] == pytest.approx(logged(plain)["grad_norm"][0], rel=0.5)
    assert found["grad_norm"][0] != logged(plain)["grad_norm"][0]
    # Both sides round alike up to the order of operations; in float32 the difference stays below 1e-3.
    assert found["sampling/sampling_logp_difference/mean"][0] < 0.02


@pytest.mark.long
def test_mini_batches_take_one_optimizer_step_each(tmp_path: Path):
    run = fit(tmp_path, "--model.mini_batches=2", "--trainer.max_steps=4")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4
    # The first mini-batch is on policy; at the second the policy has moved by one update.
    assert logged(run)["policy/approx_kl"][0] > 1e-6
    assert logged(run)["policy/ratio_max"][0] > 1.01


@pytest.mark.parametrize("choice", few(["drop", "zero"], 1))
def test_a_failing_reward_scores_zero_or_leaves_the_completion_out(tmp_path: Path, choice: str):
    (tmp_path / "my_rewards.py").write_text(
        "def right(completions, answer, **_):\n"
        "    if any('-' in completion for completion in completions):\n"
        "        raise ArithmeticError('no minus signs, please')\n"
        "    return [float(text.endswith(f'#### {right}')) for text, right in zip(completions, answer)]\n"
    )
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text(
        "model:\n  init_args:\n    rewards:\n      - class_path: app.rewards.Function\n"
        "        init_args: {path: my_rewards.right}\n"
    )
    configs = [ROOT / "configs" / "quickstart.yaml", ROOT / "configs" / "arms" / "grpo.yaml", rewards]
    done = dots(
        "fit", *(token for config in configs for token in ("--config", str(config))), *SMALL,
        f"--model.policy.path={ROOT / 'configs' / 'tiny_policy'}", f"--model.on_reward_failure={choice}",
        "--trainer.logger.save_dir=runs", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "quickstart" / "version_0"
    summary = json.loads((run / "summary.json").read_text())
    rows = pq.read_table(run / "completions" / "step_00000000.parquet").to_pylist()
    crashed = [row for row in rows if "-" in row["completion"]]
    assert summary["failed_rewards"] > 0
    if choice == "drop":
        assert not crashed
        assert 0 < len(rows) < 64
    else:
        assert len(rows) == 64
        assert crashed
        assert {row["correctness"] for row in crashed} == {0.0}


@pytest.mark.long
def test_validate_and_test_measure_what_the_run_measured(plain: Path, tmp_path: Path):
    checkpoint = plain / "checkpoints" / "last.ckpt"
    for subcommand, name in (("validate", "val"), ("test", "test")):
        done = dots(
            subcommand, "--config", str(plain / "config.yaml"), "--ckpt_path", str(checkpoint),
            f"--trainer.logger.init_args.name={subcommand}", f"--trainer.logger.init_args.save_dir={tmp_path}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        (found,) = logged(tmp_path / subcommand / "version_0")[f"{name}/accuracy"].values()
        assert found == pytest.approx(logged(plain)["val/accuracy"][1], abs=1e-6)


def test_a_csv_of_ones_own_trains(tmp_path: Path):
    file = tmp_path / "sums.csv"
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "answer", "level"])
        for first in range(1, 9):
            for second in range(1, 6):
                question = f"State the final answer to the following arithmetic problem: {first} + {second} ="
                writer.writerow([question, first + second, "easy"])
    own = tmp_path / "own.yaml"
    own.write_text(
        "model:\n  init_args:\n    rewards:\n      - class_path: app.rewards.Numeric\n"
        "data:\n  init_args:\n    train:\n      class_path: datamodules.prompts.PromptFile\n"
        f'      init_args: {{path: {file}, template: "{{question}}\\n"}}\n'
    )
    run = fit(tmp_path, "--config", str(own))
    summary = json.loads((run / "summary.json").read_text())
    assert summary["prompts_rolled_out"] == 16
    assert logged(run)["selection/mean_success"][0] > 0.1  # sums of two terms: the policy knows some
