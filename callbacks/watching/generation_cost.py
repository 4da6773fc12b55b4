"""A cost model of generation for studies: seconds that it takes elsewhere, on the clock of this run."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer

from app.module import GRPOModule
from callbacks.stages import Stage, StepCallback
from callbacks.watching.run_ledger import RunLedger
from datamodules.errors import UserError
from datamodules.types import TrainBatch


class GenerationCost(StepCallback):
    """Charges a run more seconds for every generated token than it takes, without waiting for them.

    The clock by which runs are compared and stopped, `time/rollout`, `time/reference` and what `RolloutReplay` decides
    by are then those of a machine on which generation has another share of a step. For a share `s` of a run that
    generated `N` tokens in `R` seconds and took `E` seconds for everything else, as its summary.json tells, it is
    `(s / (1 - s) E - R) / N`.

    Args:
        seconds_per_token: added for every completion token that the run generates, all ranks together; those of
            validation cost nothing, as ever.
    """

    stage = Stage.FILTER  # its seconds must be there when replay accounts for them

    def __init__(self, seconds_per_token: float) -> None:
        if not 0 <= seconds_per_token < math.inf:
            raise UserError(f"GenerationCost.seconds_per_token is {seconds_per_token}, expected 0 or more. Change it.")
        self.seconds_per_token = seconds_per_token

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        for phase, purpose in (("rollout", "train"), ("reference", "reference")):
            added = self.seconds_per_token * batch.ledger.counts[f"{purpose}/tokens"]
            batch.ledger.seconds[phase] += added
            for one in RunLedger.all_of(trainer):
                one.clock.add(added)
