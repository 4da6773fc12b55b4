"""Finished runs of a comparison, written as files instead of trained: summaries, metrics and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from app.runs.summary import Evaluation, RolloutCounts, RunSummary
from app.studies.compare.request import Arm, Budget, Request
from app.studies.compare.run_folder import RunFolder
from datamodules.ledger import PHASES

SECONDS_APART, COMPLETIONS, TOKENS = 10.0, 256, 4096
"""Seconds, completions and completion tokens of a step in a run of pace 1."""


def settings_of(selector: str) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {"max_steps": 40, "callbacks": None},
        "model": {"class_path": "app.module.GRPOModule"},
        "data": {"init_args": {"selector": {"class_path": f"datamodules.selectors.{selector}"}}},
    }


def finished_run(
    out: Path,
    arm: str,
    seed: int,
    accuracy: list[float],
    *,
    pace: float = 1.0,
    completed: bool = True,
    prompts: str = "held out",
    informative: float = 0.5,
    forecast: bool = False,
    rollout_share: float | None = None,
) -> Path:
    """Write a run that was evaluated every 10 steps with these results, each step at `pace` times the usual cost."""
    folder = RunFolder.of(out, arm, seed)
    folder.prepare(request(), Arm(arm, ()), settings_of("Dots" if forecast else "Uniform"))
    version = folder.version
    evaluations = tuple(
        Evaluation(
            step, pace * SECONDS_APART * step, round(pace * COMPLETIONS * step), round(pace * TOKENS * step), one
        )
        for step, one in zip(range(0, 10 * len(accuracy), 10), accuracy, strict=True)
    )
    steps = 10 * (len(accuracy) - 1)
    seconds = dict.fromkeys(PHASES, pace * steps) | {"total": 100.0}
    if rollout_share is not None:
        seconds["rollout"] = 0.75 * rollout_share * evaluations[-1].seconds
        seconds["environment"] = 0.25 * rollout_share * evaluations[-1].seconds
    none = RolloutCounts(0, 0, 0)
    summary = RunSummary(
        steps=steps, prompts_rolled_out=0, completions=0, completion_tokens=0, replayed_groups=7,
        informative_fraction=informative, reference=RolloutCounts(0, 64 * forecast, 0), validation=none, discarded=none,
        wasted=none, discarded_groups=0, failed_rewards=0, val={}, evaluations=evaluations, validation_prompts=prompts,
        training_seconds=evaluations[-1].seconds, seconds=seconds, rollout_overlapped_seconds=0.0, seed=seed,
        config_sha256=None, completed=completed,
    )  # fmt: skip
    with SummaryWriter(str(version)) as writer:
        for step in range(steps):
            writer.add_scalar("selection/informative_fraction", informative, step)
            writer.add_scalar("selection/fresh_informative_fraction", informative - 0.1, step)
            if forecast:
                writer.add_scalar("selection/forecast_pearson", 0.25 if step % 2 else 0.75, step)
    summary.write(version / "summary.json")
    return version


def request(names: str = "grpo fast", seeds: tuple[int, ...] = (0, 1), window: int = 1) -> Request:
    arms = tuple(Arm(name, (f"{name}.yaml",)) for name in names.split())
    return Request(("base.yaml",), arms, seeds, "grpo", Budget("baseline"), None, window)


def comparison_of_two(out: Path) -> Request:
    """Write a comparison: GRPO reaches 0.8 in 40 steps, `fast` in 20 and 10 steps, each step at half the cost."""
    out.mkdir(parents=True, exist_ok=True)
    for seed in (0, 1):
        finished_run(out, "grpo", seed, [0.4, 0.5, 0.6, 0.7, 0.8])
    finished_run(out, "fast", 0, [0.4, 0.6, 0.8, 0.8, 0.9], pace=0.5, informative=0.9, forecast=True)
    finished_run(out, "fast", 1, [0.4, 0.8, 0.9, 0.9, 0.9], pace=0.5, informative=0.7, forecast=True)
    asked = request()
    asked.save(out)
    return asked
