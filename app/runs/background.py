"""Writes that do not hold the training: one after the other in a thread of this process."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


class Background:
    """Runs work in the order in which it is submitted. After an error, what was submitted before `wait` is left out."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []
        self._group: Any = None

    def submit(self, work: Callable[[], object]) -> None:
        """Run `work` after all that was submitted before it."""
        before = list(self._pending)

        def run() -> None:
            if all(one.exception() is None for one in before):
                work()

        self._pending.append(self._threads.submit(run))

    def wait(self) -> None:
        """Return when nothing is left to do. Raises the error of the first work that failed since the last call."""
        pending, self._pending = self._pending, []
        errors = [one.exception() for one in pending]
        if error := next((one for one in errors if one is not None), None):
            raise error

    def group(self) -> Any:
        """Return a gloo process group that no other thread uses. Collective at its first call."""
        if self._group is None:
            self._group = dist.new_group(backend="gloo")
        return self._group


def copied(value: Value) -> Value:
    """Return a copy of nested containers that later changes do not reach, with its tensors on the host.

    Tensors that share their memory (a tied head) share that of the copy too.
    """
    return _copied(value, {})


def _copied(value: Any, storages: dict[tuple[torch.device, int], torch.UntypedStorage]) -> Any:
    if isinstance(value, torch.Tensor):
        storage = value.detach().untyped_storage()
        key = value.device, storage.data_ptr()
        if key not in storages:
            storages[key] = torch.UntypedStorage(storage.nbytes()).copy_(storage)
        return torch.empty(0, dtype=value.dtype).set_(
            storages[key], value.storage_offset(), value.size(), value.stride()
        )
    if isinstance(value, dict):
        return type(value)((key, _copied(one, storages)) for key, one in value.items())
    if isinstance(value, list | tuple):
        return type(value)(_copied(one, storages) for one in value)
    return value
