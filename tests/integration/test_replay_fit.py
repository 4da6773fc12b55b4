"""Replay with all limits in real runs on the embedded policy: checked against the run's files, and resumed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from tests.support.command import (
    assert_same_run,
    dots,
    dots_on_ranks,
    kill_when,
    last_checkpoint,
    run_of,
    scalars,
)

STEPS, PER_STEP, MAX_AGE, MAX_BYTES = 10, 6, 2, 11000
OVERLAY = f"""
trainer:
  callbacks:
    - class_path: callbacks.WeightSync
    - class_path: callbacks.Rollouts
    - class_path: callbacks.RolloutReplay
      init_args:
        max_age: {MAX_AGE}
        max_bytes: {MAX_BYTES}
        draw: advantage
        logprob_dtype: float16
    - class_path: callbacks.CompletionsLog
      init_args: {{every: 1}}
    - class_path: callbacks.RandomState
    - class_path: callbacks.RunLedger
    - class_path: callbacks.RunCheckpoint
      init_args: {{every: 1}}
data:
  class_path: datamodules.online.OnlinePromptDataModule
  init_args:
    selector: {{class_path: datamodules.selectors.Uniform}}
    train:
      class_path: datamodules.procedural.Procedural
      init_args:
        template: "{{question}}\\n"
        tasks:
          - {{name: chain_sum, size: 14, params: {{min_terms: 3, max_terms: 6, min_digits: 1, max_digits: 1}}}}
"""
pytestmark = pytest.mark.slow


def arguments(folder: Path, *more: str) -> list[str]:
    overlay = folder / "overlay.yaml"
    overlay.write_text(OVERLAY)
    return [
        *("fit", "--config", "configs/quickstart.yaml", "--config", str(overlay)),
        f"--trainer.max_steps={STEPS}",
        "--trainer.limit_val_batches=0",
        "--model.mini_batches=1",
        "--data.val_size=0",
        f"--data.prompts_per_step={PER_STEP}",
        "--model.sampling.max_completion_length=48",
        f"--trainer.logger.save_dir={folder}",
        *more,
    ]


@dataclass
class Written:
    """A group as `completions/*.parquet` tells it."""

    prompt: str
    source: str
    birth: int
    rows: list[dict]

    @property
    def informative(self) -> bool:
        return len({row["correctness"] for row in self.rows}) > 1

    @property
    def texts(self) -> list[str]:
        return [row["completion"] for row in self.rows]

    @property
    def bytes(self) -> int:
        """Ids of 4 and log-probs of 2 bytes per token; 2 lengths of 4, 1 finish reason, 1 version of 8 and 3 rewards
        of 4 per completion; its text."""
        return sum(6 * row["completion_tokens"] + 29 + len(row["completion"].encode()) for row in self.rows)


def groups_of(folder: Path, step: int) -> list[Written]:
    found: dict[tuple[str, str], Written] = {}
    for row in pq.read_table(run_of(folder) / "completions" / f"step_{step:08d}.parquet").to_pylist():
        key = (row["source"], row["prompt_id"])
        found.setdefault(key, Written(row["prompt_id"], row["source"], row["birth_step"], [])).rows.append(row)
    return list(found.values())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = dots(*arguments(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def test_the_buffer_is_what_the_completions_written_say(finished: Path):
    curves = scalars(finished)
    kept: list[Written] = []
    squeezed = 0
    for step in range(STEPS):
        logged = {name: curves[f"replay/{name}"][step] for name in (
            "size", "bytes", "dropped_stale", "dropped_old", "age_mean", "age_max", "fraction"
        )}  # fmt: skip
        groups = groups_of(finished, step)
        fresh = [one for one in groups if one.source == "fresh"]
        replayed = [one for one in groups if one.source == "replay"]
        assert len(groups) == PER_STEP
        assert (logged["size"], logged["bytes"]) == (len(kept), sum(one.bytes for one in kept))
        assert logged["bytes"] <= MAX_BYTES
        assert len(fresh) == PER_STEP - min(PER_STEP // 2, len(kept))
        for one in replayed:
            (stored,) = [other for other in kept if other.prompt == one.prompt]
            assert (one.birth, one.texts) == (stored.birth, stored.texts)
        ages = [step - one.birth for one in replayed] or [0]
        assert logged["age_max"] == max(ages) <= MAX_AGE
        assert logged["age_mean"] == pytest.approx(sum(ages) / len(ages))
        assert logged["fraction"] == pytest.approx(len(replayed) / PER_STEP)
        if replayed:
            assert 0 < curves["replay/effective_sample_fraction"][step] <= 1 + 1e-6
            assert curves["replay/importance_ratio_mean"][step] <= curves["replay/importance_ratio_max"][step]
            assert 0 <= curves["replay/clip_ratio"][step] <= 1

        measured = {one.prompt for one in fresh}
        assert logged["dropped_stale"] == sum(one.prompt in measured for one in kept)
        kept = [one for one in kept if one.prompt not in measured]
        kept += [one for one in fresh if one.informative]
        while sum(one.bytes for one in kept) > MAX_BYTES:
            del kept[0]
            squeezed += 1
        young = [one for one in kept if step + 1 - one.birth <= MAX_AGE]
        assert logged["dropped_old"] == len(kept) - len(young)
        kept = young
    # Each rule had something to do.
    assert squeezed > 0
    assert sum(curves["replay/dropped_stale"].values()) > 0
    assert sum(curves["replay/dropped_old"].values()) > 0
    assert max(curves["replay/age_max"].values()) > 1

    stored = last_checkpoint(finished)["callbacks"]["RolloutReplay"]
    assert stored["prompt_ids"] == [one.prompt for one in kept]
    assert stored["birth_steps"] == [one.birth for one in kept]
    assert stored["arrays"]["logprobs"].dtype == torch.float16
    assert sum(array.nbytes for array in stored["arrays"].values()) == sum(one.bytes for one in kept)


@pytest.mark.long
def test_a_killed_run_goes_on_as_if_never_stopped(finished: Path, tmp_path: Path):
    kill_when(run_of(tmp_path) / "checkpoints" / f"step_{STEPS // 2:08d}.ckpt", *arguments(tmp_path))
    assert not (run_of(tmp_path) / "summary.json").exists()
    done = dots(*arguments(tmp_path, "--ckpt_path", "last"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path, finished)


def by_drift(folder: Path, *more: str) -> list[str]:
    """Return the arguments of a run in which drift, uses, silent places and further updates all decide something."""
    given = arguments(folder, "--model.reuse.passes=3", "--model.reuse.threshold=0.0", *more)
    text = (folder / "overlay.yaml").read_text().replace("draw: advantage", "draw: drift")
    text = text.replace(f"max_age: {MAX_AGE}", "max_uses: 1\n        places: silent\n        drift_scale: 0.02")
    (folder / "overlay.yaml").write_text(text)
    return [*given, "--trainer.max_steps=14"]


@pytest.mark.long
def test_drift_uses_and_further_updates_go_on_after_a_resume_and_on_two_ranks(tmp_path: Path):
    whole, stopped, ranks = (tmp_path / name for name in ("whole", "stopped", "ranks"))
    for folder in (whole, stopped, ranks):
        folder.mkdir()
    done = dots(*by_drift(whole))
    assert done.returncode == 0, done.stderr[-2000:]
    curves = scalars(whole)
    assert any(curves["updates/reused"].values()) and not all(curves["updates/reused"].values())
    assert sum(curves["replay/dropped_used"].values()) > 2 and max(curves["replay/drift"].values()) > 0
    for more in (["--trainer.max_steps=11"], ["--ckpt_path", "last"]):
        done = dots(*by_drift(stopped), *more)
        assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(stopped, whole)
    for one in dots_on_ranks(2, *by_drift(ranks, "--config", "configs/strategy/ddp.yaml", "--trainer.devices=2")):
        assert one.returncode == 0, one.stderr[-2000:]
    shared = scalars(ranks)
    for name in ("updates/reused", "replay/dropped_used"):
        assert shared[name] == curves[name], name
    # Sums over ranks round otherwise, and AdamW makes the difference grow with every update.
    found, expected = (list(one["replay/drift"].values()) for one in (shared, curves))
    assert found[:3] == pytest.approx(expected[:3], rel=1e-3)
    assert found == pytest.approx(expected, rel=2e-2)
