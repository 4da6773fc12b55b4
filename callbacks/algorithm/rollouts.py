"""Fills every batch with scored groups, and tells the selector what they showed."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from datamodules.selectors import Selector
from datamodules.types import Outcomes, Prompt, RolloutGroup, TrainBatch


def roll_fresh(
    selector: Selector, pl_module: GRPOModule, batch: TrainBatch, prompts: Sequence[Prompt]
) -> list[RolloutGroup]:
    """Rolls prompts out with the policy of the batch's step and tells the selector what they showed.

    A prompt may be rolled out once in a step: its samples' seeds derive from the step and the prompt.
    """
    groups = pl_module.pipeline.roll(
        prompts, pl_module.sampling, batch.ledger, purpose="train", step=batch.step, source="fresh"
    )
    with batch.ledger.phase("select"):
        selector.observe(Outcomes.of(groups, batch.step, "fresh"))
    return groups


class Rollouts(StepCallback):
    """Rolls out a batch's prompts before its step: `G` completions each, scored, appended to `batch.groups`.

    Prompts that already have a group in the batch are left alone (`ReferenceRollouts` offers those that it has just
    rolled out with the same policy). Validation, test and prediction batches take the same road with the module's
    validation sampling.

    With several processes every one of them holds the whole batch, and rolls out its share of the prompts.
    """

    stage = Stage.ROLL_OUT

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        selector = trainer.datamodule.selector  # type: ignore[attr-defined]  # Lightning leaves it untyped
        offered = {group.prompt.id for group in batch.groups}
        prompts = [prompt for prompt in batch.prompts if prompt.id not in offered]
        batch.groups.extend(roll_fresh(selector, pl_module, batch, prompts))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        groups = pl_module.pipeline.roll(
            batch.prompts, pl_module.val_sampling, batch.ledger, purpose="validate", step=0, source="fresh"
        )
        batch.groups.extend(groups)

    # The three hooks of a measured batch are one; the base class's narrower annotation says otherwise.
    on_test_batch_start = on_validation_batch_start  # type: ignore[assignment]
    on_predict_batch_start = on_validation_batch_start  # type: ignore[assignment]
