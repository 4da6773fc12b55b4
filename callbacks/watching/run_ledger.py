"""The account of a run: where its seconds and tokens went, and what it reached."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.reporting.curves import draw_curves
from app.runs.folder import run_folder
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import RunCheckpoint, is_over
from callbacks.watching.cockpit import lay_out
from callbacks.watching.training_clock import TrainingClock
from datamodules.ledger import PHASES, Ledger
from datamodules.pool import PromptPool
from datamodules.seeding import run_seed
from datamodules.types import TrainBatch


class RunLedger(StepCallback):
    """Logs all metrics of a step, with `time/*` and token counts; at the end writes `summary.json` and `curves.png`.

    Interrupted runs leave both as well, with `"completed": false`. Sums go on through a resume.

    Three of the metrics are sums since the beginning, by which runs are compared: `time/training` (seconds of the
    `TrainingClock`), `num_completions` and `num_tokens` (completions, and tokens of completions, rolled out for
    training: reference sets and what filters discarded are in them, validation is not).
    """

    stage = Stage.ACCOUNT

    def __init__(self) -> None:
        self.total = Ledger()
        self.steps = 0
        self.informative_sum = 0.0
        self.evaluations: list[dict[str, float]] = []
        self.clock = TrainingClock()
        self._before = 0.0
        self._started = time.perf_counter()
        self._checkpoint_seconds = 0.0
        self._written = False

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._pools: Mapping[str, PromptPool] = trainer.datamodule.pools  # type: ignore[attr-defined]

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._started = time.perf_counter()

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.is_global_zero:
            _reopen(run_folder(trainer) / "summary.json")
        lay_out(trainer)
        self.clock.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        # The very first reference set was rolled out before this clock began; later ones lie within their steps.
        self.clock.add(batch.ledger.seconds["reference"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        # Written since the last step, so within the seconds that the clock has counted.
        self.clock.add(-self._take_checkpoint_time(trainer))
        self.total.add(batch.ledger)
        self.steps = batch.step + 1
        groups = [group for group in batch.groups if group.completions]
        informative = sum(group.informative for group in groups)
        self.informative_sum += informative / max(1, len(groups))
        batch.metrics |= self._metrics(batch)
        _log(trainer, batch)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        self.total.add(batch.ledger)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # Validation is not part of the next step's time.
        self.clock.start()
        if trainer.state.fn == "fit" and "val/accuracy" in trainer.callback_metrics:
            earlier = [one for one in self.evaluations if one["step"] < self.steps]
            self.evaluations = [*earlier, self._evaluation(float(trainer.callback_metrics["val/accuracy"]))]

    def on_train_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._write(trainer, completed=is_over(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # A run killed between its last checkpoint and its end resumes with no step to take, and no `on_train_end`.
        if self.steps and not self._written:
            self._write(trainer, completed=is_over(trainer))

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and self.steps:
            self._write(trainer, completed=False)

    def _evaluation(self, accuracy: float) -> dict[str, float]:
        """One validation, and what had been spent on training when it was made."""
        return {
            "step": self.steps,
            "seconds": round(self.clock.seconds, 3),
            "completions": self._rolled_out("completions"),
            "completion_tokens": self._rolled_out("tokens"),
            "accuracy": accuracy,
        }

    def _rolled_out(self, name: str) -> int:
        """So far, reference sets included."""
        return int(self.total.counts[f"train/{name}"] + self.total.counts[f"reference/{name}"])

    def _metrics(self, batch: TrainBatch) -> dict[str, float]:
        elapsed = self.clock.lap()
        counts, seconds = batch.ledger.counts, batch.ledger.seconds
        rolled = counts["train/tokens"] + counts["reference/tokens"]
        metrics = {f"time/{phase}": seconds[phase] for phase in PHASES if phase not in ("validate", "checkpoint")}
        metrics["time/training"] = self.clock.seconds
        metrics["step_time"] = elapsed
        metrics["num_completions"] = float(self._rolled_out("completions"))
        metrics["num_tokens"] = float(self._rolled_out("tokens"))
        metrics["tokens_per_second"] = rolled / elapsed if elapsed else 0.0
        metrics["rewards/timed_out"] = counts["rewards/timed_out"]
        metrics["rewards/crashed"] = counts["rewards/crashed"]
        prefix = "reward_metric/"
        return metrics | {name.removeprefix(prefix): counts[name] for name in counts if name.startswith(prefix)}

    def _take_checkpoint_time(self, trainer: Trainer) -> float:
        """Accounts for the seconds of checkpoints since the last call, and returns them."""
        spent = sum(one.seconds for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint))
        new, self._checkpoint_seconds = spent - self._checkpoint_seconds, spent
        self.total.seconds["checkpoint"] += new
        return new

    def _write(self, trainer: Trainer, *, completed: bool) -> None:
        self._written = True
        if not trainer.is_global_zero:
            return
        self._take_checkpoint_time(trainer)
        folder = run_folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        for logger in trainer.loggers:
            logger.save()
        _write_text(folder / "summary.json", json.dumps(self.summary(folder, completed=completed), indent=2) + "\n")
        draw_curves(folder, folder / "curves.png")

    def summary(self, folder: Path, *, completed: bool) -> dict[str, Any]:
        """What `summary.json` holds.

        `prompts_rolled_out`, `completions` and `completion_tokens` are of all training rollouts; of these, `discarded`
        were refused by a filter and `wasted` passed it but were neither needed nor kept; `discarded_groups` is the sum
        of both. `rollout_overlapped_seconds` of generation were covered by updates (`RolloutAhead`).
        `training_seconds` is the `TrainingClock`; every evaluation says what had been spent when it was made: steps,
        training seconds, and completions and their tokens, reference sets included. Two runs with the same
        `validation_prompts` were evaluated on the same prompts.
        """
        counts = self.total.counts
        seconds = {"total": self._before + time.perf_counter() - self._started}
        seconds |= {phase: self.total.seconds[phase] for phase in PHASES}
        accuracy = [evaluation["accuracy"] for evaluation in self.evaluations]

        def account(purpose: str) -> dict[str, int]:
            return {name: int(counts[f"{purpose}/{name}"]) for name in ("prompts", "completions", "tokens")}

        return {
            "steps": self.steps,
            "prompts_rolled_out": int(counts["train/prompts"]),
            "completions": int(counts["train/completions"]),
            "completion_tokens": int(counts["train/tokens"]),
            "replayed_groups": int(counts["replayed_groups"]),
            "informative_fraction": self.informative_sum / max(1, self.steps),
            "reference": account("reference"),
            "validation": account("validate"),
            "discarded": account("discarded"),
            "wasted": account("wasted"),
            "discarded_groups": int(counts["discarded/prompts"] + counts["wasted/prompts"]),
            "failed_rewards": int(counts["rewards/timed_out"] + counts["rewards/crashed"]),
            "val": {"first": accuracy[0], "best": max(accuracy), "last": accuracy[-1]} if accuracy else {},
            "evaluations": self.evaluations,
            "validation_prompts": self._pools["val"].fingerprint if "val" in self._pools else None,
            "training_seconds": round(self.clock.seconds, 3),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "rollout_overlapped_seconds": round(counts["overlapped_seconds"], 3),
            "seed": run_seed(),
            "config_sha256": _sha256(folder / "config.yaml"),
            "completed": completed,
        }

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.total.seconds),
            "counts": dict(self.total.counts),
            "steps": self.steps,
            "informative_sum": self.informative_sum,
            "evaluations": [dict(evaluation) for evaluation in self.evaluations],
            "training_seconds": self.clock.seconds,
            "before": self._before + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total.seconds.update(state_dict["seconds"])
        self.total.counts.update(state_dict["counts"])
        self.steps = state_dict["steps"]
        self.informative_sum = state_dict["informative_sum"]
        self.evaluations = [dict(evaluation) for evaluation in state_dict["evaluations"]]
        self.clock.seconds = state_dict["training_seconds"]
        self._before = state_dict["before"]


def _log(trainer: Trainer, batch: TrainBatch) -> None:
    """Sends a step's metrics to the loggers, each only at steps that measured it.

    `LightningModule.log` would repeat a metric's last value at every later step.
    """
    measured = {name: value for name, value in batch.metrics.items() if not math.isnan(value)}
    for logger in trainer.loggers:
        logger.log_metrics(measured, step=batch.step)


def _reopen(summary: Path) -> None:
    """A run that goes on is not complete, whatever it was before: it may be killed before it can say so."""
    with contextlib.suppress(OSError, ValueError):
        _write_text(summary, json.dumps({**json.loads(summary.read_text()), "completed": False}, indent=2) + "\n")


def _sha256(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
