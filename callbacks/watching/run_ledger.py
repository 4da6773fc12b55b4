"""The account of a run: its metrics, its training clock, and the summary of its cost and outcome."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from app.module import GRPOModule
from app.reporting.curves import draw_curves
from app.reporting.loggers import media_of
from app.reporting.validation import conversation_metrics
from app.runs.folder import run_folder
from app.runs.summary import SUMMARY, Evaluation, RolloutCounts, RunSummary
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import RunCheckpoint, is_over
from callbacks.watching.cockpit import CHARTS
from datamodules.errors import UserError
from datamodules.ledger import PHASES, STEP_PHASES, Ledger
from datamodules.online import OnlinePromptDataModule
from datamodules.pool import PromptPool
from datamodules.seeding import run_seed
from datamodules.types import TrainBatch


class TrainingClock:
    """Wall-clock seconds of training up to the end of the last step, by which runs are compared.

    A step lasts from the end of the previous step to its own. Validation, checkpoints, start-up, and steps lost to a
    kill are not counted: a resumed run continues from the clock of its checkpoint.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._owed = 0.0

    def start(self) -> None:
        """Measure the next step from now on."""
        self._started = time.perf_counter()

    def add(self, seconds: float) -> None:
        """Add seconds outside of the step in progress to it, or subtract negative ones."""
        self._owed += seconds

    def lap(self) -> float:
        """End the step, return its seconds, and begin the next one."""
        now = time.perf_counter()
        elapsed = max(0.0, now - self._started + self._owed)
        self._started, self._owed = now, 0.0
        self.seconds += elapsed
        return elapsed


class RunLedger(StepCallback):
    """Logs all metrics of a step, with `time/*` and token counts; at the end writes `summary.json` and `curves.png`.

    A single step has no curves. Interrupted runs get both files too, with `"completed": false`. A resumed run continues
    the sums.
    """

    stage = Stage.ACCOUNT

    def __init__(self) -> None:
        self.total = Ledger()
        self.steps = 0
        self.informative_sum = 0.0
        self.evaluations: list[Evaluation] = []
        self.clock = TrainingClock()
        self._before = 0.0
        self._started = time.perf_counter()
        self._checkpoint_seconds = 0.0
        self._written = False
        self._clashes: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: GRPOModule, stage: str) -> None:
        self._pools: Mapping[str, PromptPool] = OnlinePromptDataModule.of(trainer).pools

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._started = time.perf_counter()
        config = run_folder(trainer) / "config.yaml"
        if trainer.is_global_zero and config.exists():  # Lightning's command line has written it
            for one in media_of(trainer):
                one.settings(yaml.safe_load(config.read_text(encoding="utf-8")))

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.is_global_zero:
            # A resumed run is not complete, and may be killed before it can write so.
            path = run_folder(trainer) / SUMMARY
            with contextlib.suppress(OSError, UserError):
                dataclasses.replace(RunSummary.read(path), completed=False).write(path)
        for one in media_of(trainer):
            one.charts(CHARTS)
        self.clock.start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        # The very first reference set was rolled out before this clock started; later ones lie within their steps.
        self.clock.add(batch.ledger.seconds["reference"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        # Checkpoints since the last step were written within the seconds that the clock has counted.
        self.clock.add(-self._take_checkpoint_time(trainer))
        self.total.add(batch.ledger)
        self.steps = batch.step + 1
        informative = [group.informative for group in batch.groups if group.completions]
        self.informative_sum += sum(informative) / max(1, len(informative))
        elapsed = self.clock.lap()
        counts, seconds = batch.ledger.counts, batch.ledger.seconds
        rolled = counts["train/tokens"] + counts["reference/tokens"]
        phases = [phase for phase in STEP_PHASES if phase != "environment" or pl_module.environment is not None]
        batch.metrics |= {f"time/{phase}": seconds[phase] for phase in phases}
        batch.metrics |= {
            "time/training": self.clock.seconds,
            "step_time": elapsed,
            "num_completions": float(self._rolled_out("completions")),
            "num_tokens": float(self._rolled_out("tokens")),
            "tokens_per_second": rolled / elapsed if elapsed else 0.0,
            "rewards/timed_out": counts["rewards/timed_out"],
            "rewards/crashed": counts["rewards/crashed"],
        }
        if completions := counts["rewards/completions"]:
            batch.metrics["rewards/unscored_fraction"] = counts["rewards/unscored"] / completions
            batch.metrics["rewards/failed_fraction"] = counts["rewards/failed"] / completions
        batch.metrics |= conversation_metrics(counts)
        pl_module.scorer.incidents.report(f"Step {batch.step}")
        for name, mean in batch.ledger.reward_metrics.items():
            full = f"rewards/{name}"
            if full not in batch.metrics:
                batch.metrics[full] = mean.value
            elif full not in self._clashes:
                self._clashes.add(full)
                rank_zero_warn(
                    f"A reward function logs {name.rpartition('/')[2]!r}, but {full} is a metric that every run logs. "
                    "The value of the function is left out: give it another name in log_metric. This warning is shown "
                    "once."
                )
        # Not `LightningModule.log`, which repeats a metric's last value at every later step that doesn't measure it.
        measured = {name: value for name, value in batch.metrics.items() if not math.isnan(value)}
        for logger in trainer.loggers:
            logger.log_metrics(measured, step=batch.step)
        # For callbacks that monitor a metric, as of the last step.
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in measured.items()})

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: GRPOModule,
        outputs: object,
        batch: TrainBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.total.add(batch.ledger)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # Validation is not part of the next step's time.
        self.clock.start()
        pl_module.scorer.incidents.report("Validation")
        accuracy = pl_module.last_measured.get("val/accuracy", math.nan)  # not where a set was not due
        if trainer.state.fn == "fit" and not math.isnan(accuracy):  # it is where no completion has been scored
            evaluation = Evaluation(
                step=self.steps,
                seconds=round(self.clock.seconds, 3),
                completions=self._rolled_out("completions"),
                completion_tokens=self._rolled_out("tokens"),
                accuracy=accuracy,
            )
            self.evaluations = [*(one for one in self.evaluations if one.step < self.steps), evaluation]

    def on_test_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        pl_module.scorer.incidents.report("Test")

    def on_predict_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        pl_module.scorer.incidents.report("Prediction")

    def on_train_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._write(trainer, completed=is_over(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        # A run killed between its last checkpoint and its end resumes with no step to take, and without `on_train_end`.
        if self.steps and not self._written:
            self._write(trainer, completed=is_over(trainer))

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if trainer.state.fn == "fit" and self.steps:
            self._write(trainer, completed=False)

    def _rolled_out(self, name: str) -> int:
        """Return the count of training rollouts so far, reference sets included."""
        return int(self.total.counts[f"train/{name}"] + self.total.counts[f"reference/{name}"])

    def _take_checkpoint_time(self, trainer: Trainer) -> float:
        """Record the seconds of checkpoints since the last call, and return them."""
        spent = sum(one.seconds for one in RunCheckpoint.all_of(trainer))
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
        self._summary(folder, completed).write(folder / SUMMARY)
        draw_curves(folder, folder / "curves.png")

    def _summary(self, folder: Path, completed: bool) -> RunSummary:
        counts, config = self.total.counts, folder / "config.yaml"
        seconds = {"total": self._before + time.perf_counter() - self._started}
        seconds |= {phase: self.total.seconds[phase] for phase in PHASES}
        accuracy = [evaluation.accuracy for evaluation in self.evaluations]

        def rollouts(purpose: str) -> RolloutCounts:
            return RolloutCounts(*(int(counts[f"{purpose}/{name}"]) for name in ("prompts", "completions", "tokens")))

        return RunSummary(
            steps=self.steps,
            prompts_rolled_out=int(counts["train/prompts"]),
            completions=int(counts["train/completions"]),
            completion_tokens=int(counts["train/tokens"]),
            replayed_groups=int(counts["replayed_groups"]),
            informative_fraction=self.informative_sum / max(1, self.steps),
            reference=rollouts("reference"),
            validation=rollouts("validate"),
            discarded=rollouts("discarded"),
            wasted=rollouts("wasted"),
            discarded_groups=int(counts["discarded/prompts"] + counts["wasted/prompts"]),
            failed_rewards=int(counts["rewards/timed_out"] + counts["rewards/crashed"]),
            val={"first": accuracy[0], "best": max(accuracy), "last": accuracy[-1]} if accuracy else {},
            evaluations=tuple(self.evaluations),
            validation_prompts="+".join(
                pool.fingerprint for name, pool in self._pools.items() if name.split("/")[0] == "val"
            )
            or None,
            training_seconds=round(self.clock.seconds, 3),
            seconds={name: round(value, 3) for name, value in seconds.items()},
            rollout_overlapped_seconds=round(counts["overlapped_seconds"], 3),
            seed=run_seed(),
            config_sha256=hashlib.sha256(config.read_bytes()).hexdigest() if config.exists() else None,
            completed=completed,
            unscored_completions=int(counts["rewards/unscored"]),
            continued_tokens=int(counts["continued_tokens"]),
            aged_out_groups=int(counts["aged_out_groups"]),
            reused_groups=int(counts["reused_groups"]),
            saved_completions=int(counts["pilot/saved_completions"]),
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "seconds": dict(self.total.seconds),
            "counts": dict(self.total.counts),
            "steps": self.steps,
            "informative_sum": self.informative_sum,
            "evaluations": [dataclasses.asdict(evaluation) for evaluation in self.evaluations],
            "training_seconds": self.clock.seconds,
            "before": self._before + time.perf_counter() - self._started,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.total.seconds.update(state_dict["seconds"])
        self.total.counts.update(state_dict["counts"])
        self.steps = state_dict["steps"]
        self.informative_sum = state_dict["informative_sum"]
        self.evaluations = [Evaluation(**evaluation) for evaluation in state_dict["evaluations"]]
        self.clock.seconds = state_dict["training_seconds"]
        self._before = state_dict["before"]
