"""Completions that an engine generates in the background."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import wait as wait_for

from datamodules.types import Completion

Groups = list[tuple[Completion, ...]]
"""The `G` completions of each prompt, in order."""


class Ahead:
    """A generation in progress, as returned by `RolloutEngine.start`.

    Args:
        future: done when the generation has ended; its result is the duration in seconds.
        finish: builds the completions, given the error that ended the generation, if any.
    """

    def __init__(self, future: Future[float], finish: Callable[[BaseException | None], Groups]) -> None:
        self._future, self._finish = future, finish
        self._waited = 0.0

    def wait(self) -> None:
        """Wait until the generation has ended. Interrupting the wait (Ctrl-C) cancels the generation."""
        started = time.perf_counter()
        try:
            wait_for([self._future])
        except BaseException:
            self._future.cancel()
            raise
        self._waited += time.perf_counter() - started

    def result(self) -> Groups:
        """Wait, then return the completions of every prompt like `RolloutEngine.generate`."""
        self.wait()
        return self._finish(self._future.exception())

    @property
    def overlapped(self) -> float:
        """Seconds of generation that nobody waited for; 0 if the generation failed."""
        if self._future.exception() is not None:
            return 0.0
        return max(0.0, self._future.result() - self._waited)


async def timed(work: Coroutine[object, object, None]) -> float:
    """Await the coroutine and return its duration in seconds."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started
