"""Names the step in which a training ends with an exception, and how to go on."""

from __future__ import annotations

import contextlib

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.runs.checkpoint_files import by_age
from app.runs.folder import RunTrainer
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import RunCheckpoint
from datamodules.online import OnlinePromptDataModule
from datamodules.types import TrainBatch

NOTE = "dots: stopped in step"
_SHOWN_PROMPTS = 16


class FailedStep(StepCallback):
    """Adds a note to the exception that ends a training: the step, its prompts, the newest checkpoint and what to do.

    A training has begun as soon as its first step has completions. What fails before is a failed start, and reported
    like wrong input.
    """

    stage = Stage.PUSH_WEIGHTS

    def __init__(self) -> None:
        self._batch: TrainBatch | None = None
        self._past_first_step = False

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        self._batch, self._past_first_step = None, False  # of an earlier call with the same trainer

    @property
    def begun(self) -> bool:
        return self._past_first_step or (self._batch is not None and bool(self._batch.groups))

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        self._past_first_step = self._past_first_step or self._batch is not None
        self._batch = batch
        if self._past_first_step and isinstance(trainer, RunTrainer):
            trainer.begun = True

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if self._batch is None or not self.begun:
            return
        if isinstance(trainer, RunTrainer):
            trainer.begun = True
        replayed = [group.prompt for group in self._batch.groups]
        prompts = list(dict.fromkeys(prompt.id for prompt in [*self._batch.prompts, *replayed]))
        more = len(prompts) - _SHOWN_PROMPTS
        note = f"{NOTE} {self._batch.step} with prompts {', '.join(prompts[:_SHOWN_PROMPTS])}"
        note += f" and {more} more. " if more > 0 else ". "
        saved = by_age(*(one.folder(trainer) for one in RunCheckpoint.all_of(trainer)))
        note += (
            f"The newest checkpoint is {saved[0]}. Run the same command with --ckpt_path last to continue from it."
            if saved
            else "There is no checkpoint yet. Lower --checkpoint.every to have one earlier."
        )
        with contextlib.suppress(TypeError):  # of an exception class with `__notes__` of its own
            BaseException.add_note(exception, note)
