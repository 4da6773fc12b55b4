"""Dynamic sampling and the live view in real runs: GRESO with exploration over MoPPS, on the embedded policy."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.command import assert_same_run, dots, kill_when, last_checkpoint, run_of, scalars

STEPS = 6
OVERLAY = """
trainer:
  callbacks:
    - class_path: callbacks.WeightSync
    - class_path: callbacks.Rollouts
    - class_path: callbacks.DynamicSampling
      init_args: {max_refills: 4}
    - class_path: callbacks.RolloutReplay
    - class_path: callbacks.SelectionMonitor
      init_args: {pictures_every: 3}
    - class_path: callbacks.CompletionsLog
      init_args: {every: 1}
    - class_path: callbacks.RandomState
    - class_path: callbacks.RunLedger
    - class_path: callbacks.RunCheckpoint
      init_args: {every: 1}
data:
  class_path: datamodules.online.OnlinePromptDataModule
  init_args:
    selector:
      class_path: datamodules.selectors.Greso
      init_args:
        min_refill: 5
        explore: 0.25
        ranker: {class_path: datamodules.selectors.Mopps}
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
        "--data.val_size=4",
        "--data.prompts_per_step=6",
        "--model.sampling.max_completion_length=48",
        f"--trainer.logger.save_dir={folder}",
        *more,
    ]


def images(folder: Path) -> dict[str, dict[int, bytes]]:
    accumulator = EventAccumulator(str(run_of(folder)), size_guidance={"images": 0})
    accumulator.Reload()
    return {
        tag: {event.step: event.encoded_image_string for event in accumulator.Images(tag)}
        for tag in accumulator.Tags()["images"]
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    done = dots(*arguments(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.mark.long
def test_everything_generated_is_trained_on_kept_or_counted(finished: Path):
    summary = json.loads((run_of(finished) / "summary.json").read_text())
    curves = scalars(finished)
    trained_fresh = replayed = untrained_informative = untrained_dropped = 0
    for path in sorted((run_of(finished) / "completions").glob("step_*.parquet")):
        groups: dict[tuple[str, str, bool], list[float]] = {}
        for row in pq.read_table(path).to_pylist():
            key = (row["source"], row["prompt_id"], row["advantage"] is not None)
            groups.setdefault(key, []).append(row["correctness"])
        differs = {key: np.ptp(values) > 0 for key, values in groups.items()}
        assert all(differs[key] for key in groups if key[2])
        trained_fresh += sum(source == "fresh" and trained for source, _, trained in groups)
        replayed += sum(source == "replay" for source, _, _ in groups)
        untrained_informative += sum(differs[key] for key in groups if not key[2])
        untrained_dropped += sum(not differs[key] for key in groups if not key[2])
    surplus = sum(curves["sampling/surplus"].values())
    assert surplus > 0 and trained_fresh > 0 and replayed > 0
    assert (untrained_informative, untrained_dropped) == (surplus, summary["discarded"]["prompts"])
    assert summary["replayed_groups"] == replayed
    assert summary["prompts_rolled_out"] == trained_fresh + surplus + summary["discarded"]["prompts"]
    assert summary["completions"] == 8 * summary["prompts_rolled_out"]
    assert summary["wasted"]["prompts"] == 0
    # Whatever passed entered the buffer, one group per prompt.
    stored = last_checkpoint(finished)["callbacks"]["RolloutReplay"]
    assert len(stored["prompt_ids"]) <= trained_fresh + surplus
    # The steps' own fractions say the same.
    for step, fraction in curves["sampling/dropped_fraction"].items():
        informative = curves["selection/fresh_informative_fraction"][step]
        assert fraction == pytest.approx(1 - informative, abs=1e-6)


@pytest.mark.long
def test_the_choice_is_shown_against_a_uniform_one(finished: Path):
    curves = scalars(finished)
    assert sum(curves["selection/explored_fraction"].values()) > 0
    measured = curves["selection/uniform_informative_measured"]
    assert measured and all(0 <= value <= 1 for value in measured.values())
    # Nothing is known before the first step: Beta(1, 1) expects 1/2 of every prompt, so 1 - 2 / 2^8 of the groups.
    assert curves["selection/uniform_informative_forecast"][0] == pytest.approx(1 - 2 / 2**8)
    assert curves["selection/forecast_brier"][STEPS - 1] > 0
    distinct = list(curves["selection/distinct_prompts"].values())
    assert distinct == sorted(distinct)
    assert distinct[-1] <= json.loads((run_of(finished) / "summary.json").read_text())["prompts_rolled_out"]


def test_pictures_of_the_forecast_are_in_the_event_file(finished: Path):
    found = images(finished)
    assert sorted(found) == ["selection/forecast_scatter", "selection/reliability"]
    for tag, by_step in found.items():
        assert sorted(by_step) == [2, 5], tag
        picture = np.asarray(Image.open(io.BytesIO(by_step[5])).convert("RGB")).astype(int)
        assert picture.shape == (400, 420, 3)
        # The chosen prompts are drawn in blue inside the axes.
        inside = picture[60:340, 70:400]
        assert ((inside[..., 2] - inside[..., 0]) > 60).sum() > 20


@pytest.mark.long
def test_a_killed_run_goes_on_as_if_never_stopped(finished: Path, tmp_path: Path):
    kill_when(run_of(tmp_path) / "checkpoints" / "step_00000004.ckpt", *arguments(tmp_path))
    assert not (run_of(tmp_path) / "summary.json").exists()
    done = dots(*arguments(tmp_path, "--ckpt_path", "last"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(tmp_path, finished)
    assert images(tmp_path) == images(finished)
