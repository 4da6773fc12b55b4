"""Dots on the work of `dots throughput`: the real command, with a clock around its steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

from app.cli.dots import DotsCLI, quiet
from app.studies.throughput_case import Work
from app.studies.throughput_turns import Clock
from datamodules.types import TrainBatch


def run_dots(work: Work, data: Path, folder: Path, threads: int, clock: Clock) -> None:
    """Trains `work.steps` steps, each when it is the turn of Dots."""
    torch.set_num_threads(threads)
    config = folder / "dots.yaml"
    config.write_text(yaml.safe_dump(_config(work, data, folder), sort_keys=False))
    quiet()
    sys.argv[1:] = ["fit", "--config", str(config)]  # of this process, which is the trainer's own
    _TimedFit(clock)


class _TimedFit(DotsCLI):
    """`dots fit` with a callback before and one behind all others."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        super().__init__()

    def before_fit(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        callbacks.insert(0, _Begin(self._clock))
        callbacks.append(_End(self._clock))


class _Begin(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: TrainBatch, batch_idx: int) -> None:
        self.clock.start()


class _End(Callback):
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int) -> None:
        seconds = batch.ledger.seconds
        self.clock.stop(
            rollout=seconds["rollout"],
            reward=seconds["reward"],
            update=seconds["update"],
            completion_tokens=int(batch.ledger.counts["train/tokens"]),
        )


def _config(work: Work, data: Path, folder: Path) -> dict[str, Any]:
    """Plain GRPO with uniform selection: what TRL does too."""
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": work.steps,
            "limit_val_batches": 0,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "callbacks.WeightSync"}, {"class_path": "callbacks.Rollouts"}],
        },
        "model": {
            "class_path": "app.module.GRPOModule",
            "init_args": {
                "policy": {"path": str(work.policy)},
                "rewards": [
                    {
                        "class_path": "app.rewards.Function",
                        "init_args": {"path": "app.studies.throughput_case.scripted", "correctness": True},
                    }
                ],
                "sampling": {
                    "num_generations": work.num_generations,
                    "max_completion_length": work.completion_length,
                },
                "optimization": {"learning_rate": work.learning_rate, "weight_decay": 0.0},
                "surrogate": {"epsilon_high": 0.2},
                "max_tokens_per_microbatch": work.microbatch_tokens,
            },
        },
        "data": {
            "class_path": "datamodules.online.OnlinePromptDataModule",
            "init_args": {
                "prompts_per_step": work.prompts,
                "val_size": 0,
                "selector": {"class_path": "datamodules.selectors.Uniform"},
                "train": {"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": str(data)}},
            },
        },
    }
