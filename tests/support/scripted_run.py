"""Real short trainings whose rewards are written in the data: real policy, engine, workers, callbacks and trainer.

Every row of the data contains the scores of its completions, so the groups that a step keeps are known in advance.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint

from app.cli.trainer import DotsTrainer
from app.engines import Sampling
from app.module import GRPOModule
from app.policy.model import Policy
from app.rewards import Function, WorkerOptions
from callbacks.stages import Stage, StepCallback
from datamodules.online import OnlinePromptDataModule
from datamodules.prompts.file import PromptFile
from datamodules.selectors import Selector
from datamodules.types import RolloutGroup, TrainBatch

_REWARDS = """
from collections import Counter

def _scripted(prompts, values):
    seen = Counter()
    for prompt, scores in zip(prompts, values):
        yield float(scores[seen[prompt]])
        seen[prompt] += 1

def correct(prompts, pattern, **rest): return list(_scripted(prompts, pattern))
def shape(prompts, shape, **rest): return list(_scripted(prompts, shape))

def noted(prompts, pattern, log_metric, **rest):
    scores = list(_scripted(prompts, pattern))
    log_metric("right", sum(scores) / len(scores))
    for name in ("reward", "loss", "mean"):
        log_metric(name, 1234.5)
    return scores
"""
RIGHT, WRONG, HALF, QUARTER = (1, 1, 1, 1), (0, 0, 0, 0), (1, 0, 1, 0), (0, 0, 0, 1)


@dataclass
class Step:
    """Content of a batch at the end of its step."""

    prompts: list[str]
    forecast: np.ndarray | None
    groups: list[RolloutGroup]
    dropped: list[RolloutGroup]
    surplus: list[RolloutGroup]
    metrics: dict[str, float]
    counts: dict[str, float]


def names(groups: Sequence[RolloutGroup]) -> list[str]:
    return [group.prompt.id for group in groups]


@dataclass
class Recorder(StepCallback):
    stage: ClassVar[Stage] = Stage.SHOW_PROGRESS  # after the account

    steps: list[Step] = field(default_factory=list)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch: TrainBatch, batch_idx) -> None:
        ids = [prompt.id for prompt in batch.prompts]
        # Not copies of metrics and counts: the ledger may add to them later in the step.
        parts = batch.groups, batch.of("dropped"), batch.of("surplus"), batch.metrics, batch.ledger.counts
        self.steps.append(Step(ids, batch.forecast, *parts))


@dataclass
class Run:
    steps: list[Step]
    trainer: Trainer
    module: GRPOModule
    data: OnlinePromptDataModule


def scripted_run(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    patterns: Sequence[Sequence[float]],
    callbacks: Sequence[Callback],
    *,
    selector: Selector | None = None,
    steps: int = 2,
    prompts_per_step: int = 4,
    shapes: Sequence[Sequence[float]] | None = None,
    function: str = "correct",
    val_size: int = 0,
    max_completion_length: int = 3,
    **options: Any,
) -> Run:
    """Train on `len(patterns)` prompts `p0`, `p1`, ...; completion `g` of prompt `i` scores `patterns[i][g]`."""
    (folder / "dots_scripted_rewards.py").write_text(_REWARDS)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    rows = [
        {"id": f"p{i}", "question": f"{i} + 1 =", "answer": "0", "pattern": list(pattern)}
        | ({"shape": list(shapes[i])} if shapes else {})
        for i, pattern in enumerate(patterns)
    ]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rewards = [Function(f"dots_scripted_rewards.{function}", correctness=True)]
    if shapes:
        rewards.append(Function("dots_scripted_rewards.shape"))
    module = GRPOModule(
        Policy(path="configs/tiny_policy"),
        rewards,
        sampling=Sampling(num_generations=len(patterns[0]), max_completion_length=max_completion_length),
        reward_workers=WorkerOptions(num_workers=1),
        **options,
    )
    source = PromptFile(str(folder / "pool.jsonl"), template="{question}\n", id_column="id")
    data = OnlinePromptDataModule(source, selector=selector, prompts_per_step=prompts_per_step, val_size=val_size)
    recorder = Recorder()
    trainer = DotsTrainer(
        accelerator="cpu",
        max_steps=steps,
        check_val_every_n_epoch=None,
        val_check_interval=1 if val_size else None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(one, Checkpoint) for one in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        callbacks=[*callbacks, recorder],
    )
    trainer.fit(module, data)
    return Run(recorder.steps, trainer, module, data)
