"""Small classes with every kind of parameter that a config can hold, for test_parsing.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule

from datamodules.errors import UserError


@dataclass
class Drawing:
    temperature: float = 1.0
    top_k: int = 0


class Chooser:
    """A base class whose subclasses are named by class_path."""


class Uniform(Chooser):
    """Has no parameters."""


class Aimed(Chooser):
    def __init__(self, target: float = 0.5, mode: Literal["kernel", "trained"] = "kernel") -> None:
        if not 0 <= target <= 1:
            raise UserError(f"target={target}: expected a success rate in [0, 1]")
        self.target, self.mode = target, mode


class Replay(Callback):
    def __init__(self, delta: float = 0.5, capacity: int | None = None) -> None:
        self.delta, self.capacity = delta, capacity


class Module(LightningModule):
    def __init__(
        self,
        lr: float = 1e-3,
        drawing: Drawing | None = None,
        loss: Literal["grpo", "dapo"] = "grpo",
        validation: Drawing = Drawing(),  # noqa: B008
    ) -> None:
        super().__init__()
        self.lr = lr


class Data(LightningDataModule):
    def __init__(self, path: str, chooser: Chooser | None = None, prompts_per_step: int = 8) -> None:
        super().__init__()
        self.chooser = chooser
