"""An event loop in a thread of its own, for synchronous callers of asynchronous code."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """Runs coroutines in the background, one call or many at a time."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        # A daemon: an exit that forgot to close must not wait for it.
        self._thread = threading.Thread(target=self._loop.run_forever, name="dots-engine", daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts the coroutine; cancelling the future cancels it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result; interrupting the wait (Ctrl-C) cancels it."""
        return wait(self.submit(work))

    def close(self) -> None:
        """Cancels what still runs, lets it end, and ends the thread."""
        if self._thread.is_alive():
            self.submit(_cancel_others()).result(timeout=10)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=10)


def wait(future: Future[T]) -> T:
    """The future's result; interrupting the wait cancels its work."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
