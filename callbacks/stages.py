"""The order of callbacks within a step, and the base class of Dots' own callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar

from lightning.pytorch import Callback, Trainer

from app.module import GRPOModule
from datamodules.online import OnlinePromptDataModule


class Stage(IntEnum):
    """When a callback acts within a step. Every hook of a step calls the callbacks in this order."""

    PUSH_WEIGHTS = 0
    """Weights are pushed before any rollout needs them."""
    ROLL_OUT_REFERENCES = 10
    """Reference groups are offered to the batch before its prompts are rolled out."""
    ROLL_OUT = 20
    FILTER = 30
    REPLAY = 40
    """Replayed groups complete what the rollouts and the filter left open."""
    ROLL_OUT_AHEAD = 50
    """The next step's prompts are chosen when this step has all its groups."""
    WATCH = 60
    OTHER = 70
    """Callbacks of users and of Lightning: they see a step's groups and add metrics that are still logged."""
    RANDOM_STATE = 80
    ACCOUNT = 90
    """The ledger logs what all others have measured."""
    BUDGET = 100
    """The clock that ends a run is read after the ledger has advanced it."""
    VALIDATE = 110
    SHOW_PROGRESS = 120
    STOP = 130
    """Processes agree on a stop before the checkpoint of the step is due."""
    SAVE = 140


class StepCallback(Callback):
    """A callback with a fixed place within a step.

    Attributes:
        stage: when it acts; callbacks of one stage keep the order in which they are listed.
    """

    stage: ClassVar[Stage]

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        """Raise UserError where the run cannot work. Called before anything is loaded, generated or written."""


def stage_of(callback: Callback) -> Stage:
    """Return the stage of a callback; `Stage.OTHER` for those that are not Dots' own."""
    return callback.stage if isinstance(callback, StepCallback) else Stage.OTHER


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks sorted by stage."""
    return sorted(callbacks, key=stage_of)
