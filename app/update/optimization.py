"""Optimizer and learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_scheduler

from app.objective.ratios import check_choice
from datamodules.errors import UserError

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


@dataclass
class Optimization:
    """Options of the optimizer (AdamW) and the learning-rate schedule.

    Args:
        learning_rate: the peak learning rate of the schedule.
        weight_decay: applied to matrices only (not to biases and norms).
        betas: AdamW's decay rates.
        clip_norm: gradients with a larger norm are scaled down to it; 0 turns clipping off.
        schedule: "constant", "constant_with_warmup", "linear" or "cosine", over `trainer.max_steps`.
        warmup_steps: optimizer steps over which the rate rises to its peak.
    """

    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        checks = [
            ("learning_rate", self.learning_rate > 0, "a number above 0"),
            ("weight_decay", self.weight_decay >= 0, "0 or more"),
            ("clip_norm", self.clip_norm >= 0, "0 (off) or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
        ]
        for name, fine, expected in checks:
            if not fine:
                raise UserError(f"optimization.{name} is {getattr(self, name)}; set it to {expected}.")
        check_choice("optimization.schedule", self.schedule, SCHEDULES)

    def optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        """Return AdamW over the trainable parameters."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups = [
            {"params": [one for one in trained if one.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)

    def clip(self, model: torch.nn.Module) -> torch.Tensor:
        """Scale gradients with a larger norm down to the clip norm; return the norm before clipping."""
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.clip_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int) -> LRScheduler:
        """Return the learning-rate schedule, to be advanced once per optimizer step."""
        return get_scheduler(self.schedule, optimizer, self.warmup_steps, max(total_steps, 1))

    def apply(self, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> None:
        """Set the options in an optimizer and its schedule, which a checkpoint sets to those it was saved with."""
        for group, factor in zip(optimizer.param_groups, schedule.lr_lambdas, strict=True):
            group["betas"], group["initial_lr"] = self.betas, self.learning_rate
            group["weight_decay"] = self.weight_decay if group["params"][0].ndim >= 2 else 0.0
            group["lr"] = self.learning_rate * factor(schedule.last_epoch)
        schedule.base_lrs = [self.learning_rate] * len(optimizer.param_groups)
