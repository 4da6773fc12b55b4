"""Rollouts of every batch's prompts."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from datamodules.ledger import Ledger
from datamodules.online import OnlinePromptDataModule
from datamodules.selectors import Selector
from datamodules.types import Outcomes, Prompt, TrainBatch


class Rollouts(StepCallback):
    """Rolls out a batch's prompts before its step: `G` scored completions each, added to `batch.groups`.

    Prompts that already have a group, which `ReferenceRollouts` has just rolled out with the same policy, are skipped.
    Validation, test and prediction batches are rolled out with the sampling of their set.
    """

    stage = Stage.ROLL_OUT

    def roll_out(self, selector: Selector, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]) -> None:
        """Roll out prompts of a batch, add their groups to it and show the selector their outcomes.

        A prompt may be rolled out only once in a step: the seeds of its samples are derived from the step and the
        prompt.
        """
        groups = pl_module.pipeline.roll(
            prompts, pl_module.sampling, batch.ledger, purpose="train", step=batch.step, source="fresh"
        )
        with batch.ledger.phase("select"):
            selector.observe(Outcomes.of(groups, batch.step, "fresh"))
        batch.add(groups)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        offered = {group.prompt.id for group in batch.groups}
        prompts = [prompt for prompt in batch.prompts if prompt.id not in offered]
        if prompts:
            self.roll_out(OnlinePromptDataModule.of(trainer).selector, pl_module, batch, prompts)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        norm = batch.metrics["grad_norm"]
        applied = min(norm, pl_module.optimization.clip_norm or norm)
        OnlinePromptDataModule.of(trainer).selector.updated(batch.metrics["learning_rate"] * applied)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        measured = OnlinePromptDataModule.of(trainer).sets[pl_module.measured_set(dataloader_idx)]
        pipeline, sampling = pl_module.pipeline, pl_module.sampling_of(measured)
        batch.add(pipeline.roll(batch.prompts, sampling, batch.ledger, purpose="validate", step=0, source="fresh"))
        self._measured.add(batch.ledger)
        if self._measured.counts["validate/prompts"] > 1:
            pipeline.stop_if_a_reward_fails(self._measured, "Validation")

    def on_validation_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._measured = Ledger()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        pl_module.pipeline.stop_if_a_reward_fails(self._measured, "Validation")

    # The same for all batches that are only measured; the base class annotates these hooks more narrowly.
    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_test_start = on_predict_start = on_validation_start  # type: ignore[assignment]
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end  # type: ignore[assignment]
