"""Completions that an engine generates while its caller does other things."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from typing import Any

from datamodules.types import Completion

Finish = Callable[[BaseException | None], list[tuple[Completion, ...]]]


class Ahead:
    """What `RolloutEngine.start` returns.

    Args:
        future: done when nothing is being generated any more; its result is the seconds that it took.
        finish: makes the completions, given what went wrong.
    """

    def __init__(self, future: Future[float], finish: Finish) -> None:
        self._future, self._finish = future, finish
        self._waited = 0.0

    def wait(self) -> None:
        """Returns when nothing is being generated any more; interrupting it (Ctrl-C) breaks the generation off."""
        started = time.perf_counter()
        try:
            wait_for([self._future])
        except BaseException:
            self._future.cancel()
            raise
        self._waited += time.perf_counter() - started

    def result(self) -> list[tuple[Completion, ...]]:
        """Completions of every prompt, in order, as `RolloutEngine.generate` gives them."""
        self.wait()
        return self._finish(self._future.exception())

    @property
    def overlapped(self) -> float:
        """Seconds of generation that nobody waited for; 0 when it failed."""
        if self._future.exception() is not None:
            return 0.0
        return max(0.0, self._future.result() - self._waited)


async def timed(work: Coroutine[Any, Any, None]) -> float:
    """Awaits the work; the seconds that it took."""
    started = time.perf_counter()
    await work
    return time.perf_counter() - started
