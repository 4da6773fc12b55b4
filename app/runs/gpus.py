"""Whether torch can use this machine's GPUs, and what to do where it can't."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from lightning.pytorch.accelerators import Accelerator, CUDAAccelerator, MPSAccelerator

from datamodules.errors import UserError

DRIVER = Path("/proc/driver/nvidia/version")
_OLDEST_DRIVER = {12: 525, 13: 580}
"""The oldest driver of each CUDA: NVIDIA's CUDA compatibility guide, section "minor version compatibility"."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What decides whether torch can use an NVIDIA GPU.

    Attributes:
        usable: torch can.
        driver: version of the kernel's driver; None without one.
        cuda: version of CUDA that torch is built for; None for a CPU build.
        hidden: `CUDA_VISIBLE_DEVICES` names no GPU.
    """

    usable: bool
    driver: str | None
    cuda: str | None
    hidden: bool

    @classmethod
    def read(cls) -> GpuFacts:
        """Read them from this machine and process."""
        found = re.search(r"\b\d{3,}(?:\.\d+)+\b", DRIVER.read_text()) if DRIVER.is_file() else None
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1", "none", "NoDevFiles")
        driver = None if found is None else found[0]
        return cls(CUDAAccelerator.is_available(), driver, torch.version.cuda or torch.version.hip, hidden)

    def obstacle(self) -> str | None:
        """Return why torch can use no GPU, and what to do, in sentences; None if it can."""
        if self.usable:
            return None
        if self.hidden:
            return "CUDA_VISIBLE_DEVICES hides all GPUs. Unset it or name some."
        if self.driver is None:
            return "No NVIDIA driver is loaded. Install one, or in a container start it with --gpus all."
        if self.cuda is None:
            return (
                f"torch {torch.__version__} is a build for CPUs, though the driver {self.driver} is loaded. Install "
                "torch for CUDA: docs/gpu.md says how."
            )
        oldest = _OLDEST_DRIVER.get(int(self.cuda.partition(".")[0]), 0)
        if int(self.driver.partition(".")[0]) < oldest:
            return (
                f"The driver {self.driver} is too old for torch's CUDA {self.cuda}, which needs {oldest} or newer. "
                "Update it, or install a torch that is built for an older CUDA."
            )
        return (
            f"CUDA {self.cuda} does not start with the driver {self.driver}. In a container use --gpus all; python -c "
            "'import torch; torch.cuda.init()' shows the cause."
        )


def check_accelerator(accelerator: str | Accelerator) -> str | None:
    """Return a warning for a run on the CPU of a machine with a driver for GPUs, which "auto" would not tell.

    Raises:
        UserError: GPUs are demanded, but torch can use none.
    """
    if accelerator not in ("auto", "gpu", "cuda"):
        return None
    facts = GpuFacts.read()
    reason = facts.obstacle()
    if reason is None or (accelerator != "cuda" and MPSAccelerator.is_available()):
        return None
    if accelerator != "auto":
        raise UserError(f"trainer.accelerator is {accelerator}, but torch can use no GPU here. {reason}")
    if facts.driver is None or facts.hidden:
        return None
    return f"the run is on the CPU. {reason} Set trainer.accelerator to cpu if that is meant, or to gpu to be refused."


def default_precision(accelerator: str | Accelerator) -> Literal["bf16-mixed"] | None:
    """Return bf16-mixed where a run is on GPUs that compute in bfloat16: the weights stay in float32."""
    on_gpu = isinstance(accelerator, CUDAAccelerator) or (
        accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
    )
    return "bf16-mixed" if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else None
