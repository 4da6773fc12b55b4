"""TRL's GRPOTrainer on the work of `dots throughput`."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from app.studies.throughput_case import Work, scripted
from app.studies.throughput_turns import Clock
from datamodules.errors import UserError


def run_trl(work: Work, data: Path, folder: Path, threads: int, clock: Clock) -> None:
    """Trains `work.steps` steps, each when it is TRL's turn."""
    try:
        from datasets import load_dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer
    except ImportError as error:
        raise UserError(f"--against trl: {error}; install it with pip install 'dots-grpo[dev]'") from error
    torch.set_num_threads(threads)
    completions = work.prompts * work.num_generations
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=completions // work.microbatches,
        gradient_accumulation_steps=work.microbatches,
        num_generations=work.num_generations,
        max_completion_length=work.completion_length,
        max_steps=work.steps,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        use_cpu=True,
        # What its defaults would add in time without being asked for here.
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        seed=0,
    )
    watch = _Watch(clock)

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            watch.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop()

    trainer = GRPOTrainer(
        model=str(work.policy),
        reward_funcs=scripted,
        args=config,
        train_dataset=load_dataset("json", data_files=str(data), split="train", cache_dir=str(folder / "cache")),
        callbacks=[Timed()],
    )
    watch.follow(trainer)
    trainer.train()


class _Watch:
    """Takes a step's time apart by timing the methods of the trainer that its phases are."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._clear()

    def _clear(self) -> None:
        self.seconds = {"rollout": 0.0, "prepare": 0.0}
        self.completion_tokens = 0

    def follow(self, trainer: Any) -> None:
        trainer._generate = self._timed(trainer._generate, "rollout")
        trainer._prepare_inputs = self._timed(trainer._prepare_inputs, "prepare")
        trainer._calculate_rewards = self._counted(trainer._calculate_rewards)

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[phase] += time.perf_counter() - started
            return result

        return call

    def _counted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(inputs: Any, prompts: Any, completions: Any, completion_ids: Any, *rest: Any) -> Any:
            self.completion_tokens += sum(len(ids) for ids in completion_ids)
            return method(inputs, prompts, completions, completion_ids, *rest)

        return call

    def start(self) -> None:
        self.clock.start()
        self._clear()

    def stop(self) -> None:
        # Scoring and its bookkeeping are what preparing the inputs takes beside generation.
        scoring = self.seconds["prepare"] - self.seconds["rollout"]
        self.clock.stop(
            rollout=self.seconds["rollout"],
            reward=scoring,
            update=None,
            completion_tokens=self.completion_tokens,
        )
