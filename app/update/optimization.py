"""Optimizer and learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR

from app.objective.ratios import check_choice
from app.policy.sharding import own_part
from app.ranks import Ranks
from datamodules.errors import UserError

SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")


def can_fuse(trained: Sequence[torch.nn.Parameter]) -> bool:
    """Return whether AdamW can be one kernel over all parameters, without copies of its state: on CUDA alone.

    A CPU has such a kernel too, which rounds differently.
    """
    return all(one.device.type == "cuda" for one in trained)


@dataclass
class Optimization:
    """Options of the optimizer (AdamW) and the learning-rate schedule.

    Args:
        learning_rate: the peak learning rate of the schedule.
        weight_decay: applied to matrices only (not to biases and norms).
        betas: AdamW's decay rates.
        clip_norm: gradients with a larger norm are scaled down to it; 0 turns clipping off.
        schedule: "constant", "constant_with_warmup", or after the warm-up "linear" or "cosine" down to 0 over the
            optimizer steps of `trainer.max_steps`, which these two need.
        warmup_steps: optimizer steps over which the rate rises to its peak; not with "constant".
    """

    learning_rate: float = 1e-6
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        def finite(*values: float) -> bool:
            return all(map(math.isfinite, values))

        checks = [
            # AdamW cannot compute with a rate beyond float32's range.
            ("learning_rate", 0 < self.learning_rate <= 1e30, "a number above 0, at most 1e30"),
            # AdamW multiplies weights by 1 - rate x decay.
            ("weight_decay", 0 <= self.weight_decay * self.learning_rate < 1, "0 or more, below 1 / learning_rate"),
            ("betas", all(0 <= beta < 1 for beta in self.betas), "two numbers of 0 or more and below 1"),
            ("clip_norm", finite(self.clip_norm) and self.clip_norm >= 0, "0 (off) or more"),
            ("warmup_steps", self.warmup_steps >= 0, "0 or more"),
        ]
        for name, fine, expected in checks:
            if not fine:
                raise UserError(f"optimization.{name} is {getattr(self, name)}; set it to {expected}.")
        check_choice("optimization.schedule", self.schedule, SCHEDULES)
        if self.warmup_steps and self.schedule == "constant":
            raise UserError(
                f"optimization.warmup_steps is {self.warmup_steps}, but the schedule constant has no warm-up. Set "
                "optimization.schedule to constant_with_warmup."
            )

    def optimizer(self, model: torch.nn.Module) -> torch.optim.AdamW:
        """Return AdamW over the trainable parameters. Raises UserError if one is too narrow to hold small updates."""
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if narrow := [one.dtype for one in trained if one.dtype.itemsize < 4]:
            raise UserError(
                f"Trained weights are {narrow[0]}, in which most updates vanish, expected float32 or wider. Leave out "
                "policy.dtype and set trainer.precision to 32-true, or to bf16-mixed to compute in bfloat16."
            )
        groups = [
            {"params": [one for one in trained if one.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [one for one in trained if one.ndim < 2], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, fused=can_fuse(trained) or None)

    def apply(self, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        """Make an optimizer and a schedule that a checkpoint has restored follow these options, not those saved.

        The checkpoint may be from another device: whether AdamW is fused is that of this one.
        """
        rate = self.learning_rate * scheduler.lr_lambdas[0](scheduler.last_epoch)
        fused = can_fuse([one for group in optimizer.param_groups for one in group["params"]]) or None
        for group in optimizer.param_groups:
            decay = self.weight_decay if group["params"][0].ndim >= 2 else 0.0
            group |= {"lr": rate, "initial_lr": self.learning_rate, "betas": self.betas, "weight_decay": decay}
            group["fused"] = fused
        for parameter, state in optimizer.state.items():
            state["step"] = state["step"].to(parameter.device if fused else "cpu")  # where AdamW wants to have it
        scheduler.base_lrs = [self.learning_rate] * len(optimizer.param_groups)

    def clip(self, model: torch.nn.Module) -> torch.Tensor:
        """Scale gradients with a larger norm down to the clip norm; return the norm before clipping."""
        trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(trained, self.clip_norm or float("inf"))
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def check_weights(self, model: torch.nn.Module, ranks: Ranks, step: int) -> None:
        """Raise UserError if the norm of the trained weights is not finite after an optimizer step.

        Nothing can be saved then: the weights before the step are in the last checkpoint only. Collective if the policy
        is sharded.
        """
        trained = [own_part(one.detach()) for one in model.parameters() if one.requires_grad]
        infinite = not bool(torch.isfinite(torch.nn.utils.get_total_norm(trained)))
        if ranks.any(infinite) if any(isinstance(one, DTensor) for one in model.parameters()) else infinite:
            raise UserError(
                f"Stopped at step {step}: the update made the norm of the weights NaN or infinite. The last checkpoint "
                f"has weights from before it: resume with model.optimization.learning_rate below {self.learning_rate}."
            )

    def check_length(self, total_steps: int | None) -> None:
        """Raise UserError if the schedule needs a limit on the run and there is none; warn of a warm-up without end.

        Args:
            total_steps: optimizer steps of the run; None if it has no limit.
        """
        if total_steps is None and self.schedule in ("linear", "cosine"):
            raise UserError(
                f"model.optimization.schedule is {self.schedule}, which ends after trainer.max_steps optimizer steps, "
                "but that is not set. Set it (trainer.max_time may end the run earlier), or set the schedule to "
                "constant or constant_with_warmup."
            )
        if total_steps is not None and self.warmup_steps >= total_steps:
            rank_zero_warn(
                f"model.optimization.warmup_steps is {self.warmup_steps}, but the run takes {total_steps} optimizer "
                "steps: it ends before the learning rate is at its peak."
            )

    def scheduler(self, optimizer: torch.optim.Optimizer, total_steps: int | None) -> LambdaLR:
        """Return the learning-rate schedule, to be advanced once per optimizer step; see `check_length`."""
        warmup = self.warmup_steps

        def factor(step: int) -> float:
            if step < warmup:
                return step / warmup
            if total_steps is None or self.schedule in ("constant", "constant_with_warmup"):
                return 1.0
            done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
            return 1 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))

        return LambdaLR(optimizer, factor)
