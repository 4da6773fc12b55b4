"""Loaders of prompts: those of training steps, and those of a pool in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from datamodules.pool import PromptPool
from datamodules.types import TrainBatch

_ENDLESS = 10**9


class OnlineLoader:
    """An endless loader of the batches of steps, whose state is the number of steps begun.

    It has a length (`trainer.max_steps` ends the run) because Lightning fetches a loader without one a batch ahead, and
    a choice must depend on the outcomes of the previous step.
    """

    def __init__(self, next_batch: Callable[[int], TrainBatch]) -> None:
        self._next_batch = next_batch
        self._step = 0

    def __len__(self) -> int:
        return _ENDLESS

    def __iter__(self) -> Iterator[TrainBatch]:
        while True:
            self._step += 1
            yield self._next_batch(self._step - 1)

    def state_dict(self) -> dict[str, int]:
        return {"step": self._step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._step = state["step"]


class FixedLoader:
    """Loader of a validation, test or prediction pool, in order, `batch_size` prompts at a time.

    It yields nothing when the pool is not due.
    """

    def __init__(self, pool: PromptPool, batch_size: int, is_due: Callable[[], bool]) -> None:
        self._pool, self._batch_size, self._is_due = pool, batch_size, is_due

    def __len__(self) -> int:
        return -(-len(self._pool) // self._batch_size)

    def __iter__(self) -> Iterator[TrainBatch]:
        for position in range(len(self) if self._is_due() else 0):
            first = position * self._batch_size
            last = min(first + self._batch_size, len(self._pool))
            yield TrainBatch(position, [self._pool[index] for index in range(first, last)])
