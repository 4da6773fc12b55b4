"""The order of callbacks within a step, and the base class of Dots' own callbacks."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum
from typing import ClassVar, Self

from lightning.pytorch import Callback, Trainer

from app.module import GRPOModule
from datamodules.online import OnlinePromptDataModule


class Stage(IntEnum):
    """When a callback acts within a step: every hook calls the callbacks in this order."""

    PUSH_WEIGHTS = 0  # before any rollout needs them
    ROLL_OUT_REFERENCES = 10  # reference groups are offered before the batch's own prompts are rolled out
    AGREE_TO_STOP = 20  # once the step's pushes and reference rollouts are over, before its checkpoint is due
    ROLL_OUT = 30
    FILTER = 40
    REPLAY = 50  # replayed groups complete what the rollouts and the filter left open
    ROLL_OUT_AHEAD = 60  # the next step's prompts are chosen once this step has all its groups
    WATCH = 70
    OTHER = 80  # callbacks of users and of Lightning: they see all groups, and their metrics are still logged
    RANDOM_STATE = 90
    ACCOUNT = 100  # logs what all others have measured
    BUDGET = 110  # reads the clock that the account has just advanced
    VALIDATE = 120
    SHOW_PROGRESS = 130
    SAVE = 140


class StepCallback(Callback):
    """A callback with a fixed place within a step. Callbacks of one stage keep the order in which they are listed."""

    stage: ClassVar[Stage]

    @classmethod
    def all_of(cls, trainer: Trainer) -> list[Self]:
        """Return the run's callbacks of this class, in order."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        return [one for one in callbacks if isinstance(one, cls)]

    def check(self, trainer: Trainer, module: GRPOModule, datamodule: OnlinePromptDataModule) -> None:
        """Raise UserError if the run cannot work. Called before anything is loaded, generated or written."""


def in_order(callbacks: Iterable[Callback]) -> list[Callback]:
    """Return the callbacks sorted by stage; those that are not Dots' own act at `Stage.OTHER`."""
    return sorted(callbacks, key=lambda one: one.stage if isinstance(one, StepCallback) else Stage.OTHER)
