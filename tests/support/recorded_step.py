"""A stand-in for CUDA graphs on a CPU: records the operators of a step, and repeats them with the same tensors.

As in a CUDA graph, addresses and all numbers of the host are those of the recording, and Python does not run again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HOST = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "_pin_memory"}
"""Operators that wait for the device or whose result has a size that depends on values."""


class _Record(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        # An indexing by a boolean mask has a size that depends on values too.
        masks = name.startswith("index") and any(getattr(one, "dtype", None) is torch.bool for one in tree_leaves(args))
        if name in HOST or masks:
            raise RuntimeError(f"{name} cannot be captured")
        output = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, output))
        return output


class Recorder:
    """Captures steps.

    Attributes:
        captured: number of recordings.
        replayed: number of repetitions.
    """

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Record() as record:
            output = step()
        self.captured += 1

        def replay() -> Tensor:
            self.replayed += 1
            for func, args, kwargs, outputs in record.calls:
                for old, new in zip(tree_leaves(outputs), tree_leaves(func(*args, **kwargs)), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)
            return output

        return replay
