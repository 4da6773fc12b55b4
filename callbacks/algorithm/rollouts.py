"""Fills every batch with scored groups, and tells the selector what they showed."""

from __future__ import annotations

import atexit
import signal
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.module import GRPOModule
from app.ranks import LostRankError
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import validation_follows
from callbacks.upkeep.order import check_order
from callbacks.upkeep.ranks_check import check_ranks
from callbacks.upkeep.stop_signal import StopSignal
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

    fills_batches = True
    """Without a callback that does, a run would train on nothing: the module looks for one."""

    def __init__(self) -> None:
        self._stop = StopSignal()

    def check_first(self, trainer: Trainer, pl_module: Any) -> None:
        """Raises UserError for strategies, sizes or an order of callbacks that no run can have."""
        check_ranks(trainer, pl_module)
        check_order(trainer)

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self.check_first(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._stop.install(pl_module.ranks)

    def on_train_batch_start(self, trainer: Trainer, pl_module: GRPOModule, batch: TrainBatch, batch_idx: int) -> None:
        selector = trainer.datamodule.selector  # type: ignore[attr-defined]  # Lightning leaves it untyped
        offered = {group.prompt.id for group in batch.groups}
        prompts = [prompt for prompt in batch.prompts if prompt.id not in offered]
        batch.groups.extend(roll_fresh(selector, pl_module, batch, prompts))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: Any, batch: TrainBatch, batch_idx: int
    ) -> None:
        if not validation_follows(trainer, batch_idx):
            self._stop.agree(trainer, pl_module.ranks)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.state.fn == "fit":
            self._stop.agree(trainer, pl_module.ranks)

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            self._stop.give_exit_code(exception, trainer)
        launcher = trainer.strategy.launcher
        if isinstance(exception, LostRankError) and isinstance(launcher, _SubprocessScriptLauncher):
            # Whoever hangs would outlive the run: Lightning ends its processes only when one of them has failed. Not
            # yet: it kills this one too, within seconds of a child's death, before the message is out.
            atexit.register(launcher.kill, signal.SIGKILL)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._stop.remove()

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
