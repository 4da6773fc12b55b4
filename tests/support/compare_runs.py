"""Finished runs of a comparison, written as files instead of trained: summaries, metrics and settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from app.studies.compare.request import Arm, Budget, Request
from app.studies.compare.run_folder import RunFolder
from datamodules.ledger import PHASES

SECONDS_APART, COMPLETIONS, TOKENS = 10.0, 256, 4096
"""Seconds, completions and completion tokens of a step in a run of pace 1."""


def settings_of(selector: str) -> dict[str, Any]:
    return {
        "seed_everything": 0,
        "trainer": {"max_steps": 40, "callbacks": [{"class_path": "callbacks.Rollouts"}]},
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
    evaluations = [_evaluation(10 * place, pace, one) for place, one in enumerate(accuracy)]
    steps = 10 * (len(accuracy) - 1)
    seconds = dict.fromkeys(PHASES, pace * steps) | {"total": 100.0}
    if rollout_share is not None:
        seconds["rollout"] = rollout_share * evaluations[-1]["seconds"]
    counts = {"prompts": 0, "completions": 0, "tokens": 0}
    summary = {
        "steps": steps,
        "replayed_groups": 7,
        "informative_fraction": informative,
        "reference": counts | {"completions": 64 * forecast},
        "discarded": counts,
        "evaluations": evaluations,
        "validation_prompts": prompts,
        "training_seconds": evaluations[-1]["seconds"],
        "seconds": seconds,
        "completed": completed,
    }
    with SummaryWriter(str(version)) as writer:
        for step in range(steps):
            writer.add_scalar("selection/informative_fraction", informative, step)
            writer.add_scalar("selection/fresh_informative_fraction", informative - 0.1, step)
            if forecast:
                writer.add_scalar("selection/forecast_pearson", 0.25 if step % 2 else 0.75, step)
    (version / "summary.json").write_text(json.dumps(summary))
    return version


def _evaluation(step: int, pace: float, accuracy: float) -> dict[str, float]:
    return {
        "step": step,
        "seconds": pace * SECONDS_APART * step,
        "completions": round(pace * COMPLETIONS * step),
        "completion_tokens": round(pace * TOKENS * step),
        "accuracy": accuracy,
    }


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
