"""Token steps as CUDA graphs: a step's kernels are recorded once per shape and then launched together.

Eager decoding of a small model waits for the launch of its kernels, of which a token needs hundreds.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

Step = Callable[[], Tensor]
Capture = Callable[[Step], Step]
"""Records a step, which may or may not run, and returns the function that repeats it with the same tensors."""

EAGER_STEPS = 4
"""Steps of a shape before it is captured, which costs about as much as these."""

SMALLEST = 8
"""Smallest padded number of rows or contexts."""

COLUMNS = 256
"""Columns of keys and values are padded to a multiple of this."""


@dataclass(frozen=True, slots=True)
class StepShape:
    """Padded sizes of a token step, which decide the shapes of all its tensors.

    Attributes:
        rows: rows that are decoded, `R`.
        contexts: contexts whose keys and values are read, `g`.
        longest: columns of a context, `P`.
        columns: columns of generated tokens, `C`.
    """

    rows: int
    contexts: int
    longest: int
    columns: int


def padded_count(count: int, most: int) -> int:
    """Return the next power of two, at least `SMALLEST` and at most `most`."""
    return min(most, max(SMALLEST, 1 << (count - 1).bit_length()))


def padded_columns(columns: int, most: int) -> int:
    """Return the next multiple of `COLUMNS`, at most `most`."""
    return min(most, -(-columns // COLUMNS) * COLUMNS)


class StepGraphs:
    """Runs the token steps of one generation.

    Graphs end with the generation, because weights in another dtype, gathered or merged ones have other addresses in
    the next. They share one pool of memory, and their output is copied out of it, so that they take no more memory than
    the largest of them.

    Args:
        step: computes the logits `[R, V]` of a shape from its numbers (int64 `[X]`, on the device).
        capture: how a step is recorded.
        device: of the model.
        max_rows: largest `R`.

    Attributes:
        failed: whether a step could not be captured; all steps are eager from then on.
    """

    def __init__(
        self, step: Callable[[StepShape, Tensor], Tensor], capture: Capture, device: torch.device, max_rows: int
    ) -> None:
        self._step, self._capture, self._device, self._max_rows = step, capture, device, max_rows
        self._numbers: dict[StepShape, Tensor] = {}
        self._eager_steps: Counter[StepShape] = Counter()
        self._replays: dict[StepShape, Step] = {}
        self._logits: Tensor | None = None
        self.failed = False

    def __call__(self, shape: StepShape, numbers: np.ndarray) -> Tensor:
        """Return the logits `[R, V]` of the next token, which the next call overwrites."""
        given = torch.from_numpy(numbers)
        if shape in self._numbers:
            self._numbers[shape].copy_(given)
        else:
            self._numbers[shape] = given.to(self._device, copy=True)
        if self._eager_steps[shape] == EAGER_STEPS and shape not in self._replays and not self.failed:
            self._record(shape)
        if shape in self._replays:
            return self._replays[shape]()
        self._eager_steps[shape] += 1
        logits = self._step(shape, self._numbers[shape])
        if self._logits is None:
            self._logits = logits.new_empty(self._max_rows, logits.shape[1])
        return logits

    def _record(self, shape: StepShape) -> None:
        numbers = self._numbers[shape]

        def step() -> Tensor:
            logits = self._step(shape, numbers)
            assert self._logits is not None
            return self._logits[: shape.rows].copy_(logits)

        try:
            self._replays[shape] = self._capture(step)
        except RuntimeError as error:
            self.failed = True
            warnings.warn(
                "Tokens are decoded without CUDA graphs from now on, because a step of this policy could not be "
                f"recorded ({str(error).splitlines()[0]}). To decode so from the start, set "
                "model.engine.cuda_graphs=false.",
                stacklevel=2,
            )


def capture_on(device: torch.device, model: torch.nn.Module) -> Capture | None:
    """Return how steps of a model are captured; None on a CPU and for sharded policies, whose hooks wait for others."""
    if device.type != "cuda" or any(isinstance(module, FSDPModule) for module in model.modules()):
        return None
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # `torch.cuda.graph` leaves its own stream current if the capture fails. Other threads, such as NCCL's, may go
        # on calling CUDA meanwhile.
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),
            torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"),
        ):
            output = step()

        def replay() -> Tensor:
            graph.replay()
            return output

        return replay

    return capture
