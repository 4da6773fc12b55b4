"""The objective through the real command: every published variant, updates that are not finite, nothing to learn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.command import ROOT, Done, dots, logged, run_of

OBJECTIVES = sorted(path.stem for path in (ROOT / "configs" / "objective").glob("*.yaml"))
BASE = ["--config", "configs/quickstart.yaml", "--config", "configs/arms/grpo.yaml"]
SMALL = [
    "--model.mini_batches=1",
    "--trainer.val_check_interval=100",
    "--data.val_size=4",
    '--data.train.tasks=[{"name":"chain_sum","size":80,"params":{"min_terms":2,"max_terms":5,"max_digits":1}}]',
    "--data.prompts_per_step=6",
    "--model.sampling.max_completion_length=32",
    "--model.val_sampling.max_completion_length=8",
]
POISON = '''
import dataclasses
import numpy as np
from lightning.pytorch import Callback

class Poison(Callback):
    """Makes the behaviour log-probs of one completion that has an advantage NaN."""
    def __init__(self, steps: list[int]):
        self.steps = steps
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch.step in self.steps:
            group = next(group for group in batch.groups if group.informative)
            place = batch.rollouts.index((group, "trained"))
            completions = list(group.completions)
            completions[3] = dataclasses.replace(completions[3], logprobs=np.full_like(completions[3].logprobs, np.nan))
            batch.rollouts[place] = (dataclasses.replace(group, completions=tuple(completions)), "trained")
            print("poisoned", f"{group.prompt.id}[3]", flush=True)
'''

pytestmark = pytest.mark.slow


def fit(folder: Path, *more: str) -> tuple[Done, Path]:
    done = dots("fit", *BASE, *SMALL, f"--trainer.logger.save_dir={folder}", *more, path=folder)
    return done, run_of(folder)


def poison(steps: list[int]) -> str:
    """The option that adds `POISON`, which the test has written to its folder."""
    return f'--trainer.callbacks+={{"class_path":"poison.Poison","init_args":{{"steps":{steps}}}}}'


def scalars(run: Path, tag: str) -> list[float]:
    return list(logged(run)[tag].values())


def weights(run: Path) -> dict[str, torch.Tensor]:
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return {name.removeprefix("policy_model."): tensor for name, tensor in state.items()}


def test_a_truncated_distribution_is_corrected_for(tmp_path: Path) -> None:
    """The ratio to the policy before the update starts at 1; kept tokens weigh their share of the distribution."""
    options = ["--model.sampling.top_p=0.8", "--model.mini_batches=2", "--model.optimization.learning_rate=1e-12"]
    done, run = fit(tmp_path, *options, "--trainer.max_steps=2", "--data.prompts_per_step=24")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model.sampling has top_p=0.8 and top_k=0: tokens that are left out are never tried" in done.stderr
    assert scalars(run, "policy/ratio_mean")[0] == pytest.approx(1, abs=1e-4)
    assert scalars(run, "policy/ratio_max")[0] == pytest.approx(1, abs=1e-3)
    # The kept tokens' share is at least top_p: without the old log-probabilities these were the clipped ratios.
    assert scalars(run, "sampling/importance_sampling_ratio/min")[0] >= 0.8 - 1e-3
    assert scalars(run, "sampling/importance_sampling_ratio/max")[0] <= 1 + 1e-3
    assert 0.8 < scalars(run, "sampling/importance_sampling_ratio/mean")[0] < 0.999


@pytest.mark.long
def test_every_published_variant_takes_a_step(tmp_path: Path) -> None:
    assert len(OBJECTIVES) >= 18
    losses = {}
    for name in OBJECTIVES:
        done, run = fit(tmp_path / name, "--config", f"configs/objective/{name}.yaml", "--trainer.max_steps=1")
        assert done.returncode == 0, done.stderr[-2000:]
        assert scalars(run, "grad_norm")[0] > 0
        assert scalars(run, "updates/skipped") == [0.0]
        losses[name] = scalars(run, "loss")[0]
        assert ("kl" in logged(run)) == (name == "grpo")
    # On policy and centred within groups, the clipped losses are 0 under a mean over completions; CISPO's is not.
    assert losses["gspo"] == pytest.approx(0, abs=1e-5)
    assert abs(losses["cispo"]) > 1e-3


def test_one_update_that_is_not_finite_is_left_out_and_named(tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    done, run = fit(tmp_path, "--trainer.max_steps=3", poison([1]))
    assert done.returncode == 0, done.stderr[-2000:]
    name = done.stdout.split("poisoned ")[1].split()[0]
    assert f"step 1: update skipped, not finite: loss nan, gradient norm nan, from {name}\n" in done.stderr
    assert scalars(run, "updates/skipped") == [0.0, 1.0, 0.0]
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(run).values())


@pytest.mark.long
def test_three_in_a_row_end_the_run_with_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "poison.py").write_text(POISON)
    done, run = fit(tmp_path, "--trainer.max_steps=6", "--trainer.val_check_interval=4", poison([1, 2, 3]))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("dots: error:")]
    assert "Stopped at step 3: 3 updates in a row were not finite" in line and "Traceback" not in done.stderr
    assert (run / "checkpoints" / "step_00000004.ckpt").is_file()
    assert json.loads((run / "summary.json").read_text())["completed"] is False
    before = weights(run)
    assert all(torch.isfinite(tensor).all() for tensor in before.values())
    done, _ = fit(tmp_path, "--trainer.max_steps=6", "--ckpt_path=last")
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((run / "summary.json").read_text())["steps"] == 6
    after = weights(run)
    assert any(not torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.long
def test_a_batch_without_advantages_changes_nothing_and_says_so(tmp_path: Path) -> None:
    always = '[{"class_path":"app.rewards.Format","init_args":{"pattern":"(?s).*"}}]'
    done, run = fit(
        tmp_path, "--trainer.max_steps=3", f"--model.rewards={always}", "--model.optimization.schedule=linear"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("No completion of a batch had an advantage") == 1
    assert scalars(run, "updates/empty") == [1.0, 1.0, 1.0]
    assert scalars(run, "loss") == scalars(run, "grad_norm") == [0.0, 0.0, 0.0]
    # The optimizer's count and the schedule advance together: linear from 3e-4, and 0 after three steps.
    assert scalars(run, "learning_rate") == pytest.approx([3e-4, 2e-4, 1e-4], abs=1e-9)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    initial = load_file(ROOT / "configs" / "tiny_policy" / "model.safetensors")
    trained = weights(run)
    assert all(torch.equal(trained[name], tensor) for name, tensor in initial.items())
