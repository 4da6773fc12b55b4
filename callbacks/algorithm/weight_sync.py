"""Transfer of the policy's weights to the rollout engine."""

from __future__ import annotations

from lightning.pytorch import Trainer

from app.module import GRPOModule
from app.policy.adapters import is_adapted
from app.policy.weights import plain_weights
from callbacks.stages import Stage, StepCallback
from datamodules.types import TrainBatch


class WeightSync(StepCallback):
    """Pushes the policy's weights to the engine after every step, and once before the first rollout.

    The version of the weights is the number of optimizer updates that they have seen; every completion carries it. For
    a policy with adapters, pushes after the first contain only the weights that the adapters change.
    """

    stage = Stage.PUSH_WEIGHTS

    _pushed: int | None = None

    # Not on_fit_start: a resumed run has its weights there, but not yet its number of updates.
    def on_train_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        self._pushed = None
        self._push(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        with batch.ledger.phase("rollout"):
            pl_module.pipeline.engine.settle()
        with batch.ledger.phase("sync"):
            self._push(trainer, pl_module)

    def _push(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        model = pl_module.policy_model
        since = self._pushed if is_adapted(model) else None
        pl_module.pipeline.engine.push(plain_weights(model, changing=since is not None), trainer.global_step, since)
        self._pushed = trainer.global_step
