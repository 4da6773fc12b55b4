"""TRL's GRPOTrainer in the throughput benchmark.

TRL reports only the time of a whole step. To tell its phases apart, three private methods of the pinned version are
timed: `_generate` (rollout), `_prepare_inputs` (rollout and scoring) and `_calculate_rewards` (its tokens are counted).
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tests.benchmarks.turns import Clock


class StepTimer(TrainerCallback):
    """Times the steps of a trainer and their phases."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds = {"rollout": 0.0, "prepare": 0.0}
        self._completion_tokens = 0

    def follow(self, trainer: Any) -> None:
        """Wrap the private methods of a trainer that are its phases."""
        trainer._generate = self._timed(trainer._generate, "rollout")
        trainer._prepare_inputs = self._timed(trainer._prepare_inputs, "prepare")
        calculate = trainer._calculate_rewards

        def counted(inputs: Any, prompts: Any, completions: Any, completion_ids: Any, *rest: Any) -> Any:
            self._completion_tokens += sum(len(ids) for ids in completion_ids)
            return calculate(inputs, prompts, completions, completion_ids, *rest)

        trainer._calculate_rewards = counted

    def _timed(self, method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self._seconds[phase] += time.perf_counter() - started
            return result

        return call

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._clock.start()
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        self._completion_tokens = 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        rollout = self._seconds["rollout"]
        # Preparing the inputs is generation and scoring.
        reward = self._seconds["prepare"] - rollout
        self._clock.stop(rollout=rollout, reward=reward, update=None, completion_tokens=self._completion_tokens)


def run_trl(options: Namespace, folder: Path, reward: Callable[..., list[float]], clock: Clock) -> None:
    """Train the steps of a case, each when it is TRL's turn."""
    # Slow to import, and the process of Dots, which imports this file too, does not need them.
    from datasets import load_dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    config = GRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=options.prompts * options.num_generations // options.trl_microbatches,
        gradient_accumulation_steps=options.trl_microbatches,
        num_generations=options.num_generations,
        max_completion_length=options.completion_length,
        max_steps=options.warmup + options.pairs,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        use_cpu=True,
        # Defaults that would take time for something that the benchmark does not ask for.
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10**6,
        seed=0,
    )
    timer = StepTimer(clock)
    data = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder / "cache"))
    trainer = GRPOTrainer(
        model=str(folder / "policy"), reward_funcs=reward, args=config, train_dataset=data, callbacks=[timer]
    )
    timer.follow(trainer)
    trainer.train()
