"""Limits on time and memory for code that comes with data or a model: chat templates."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SECONDS = 10
"""CPU time for one prompt."""

MEMORY = 4 * 2**30
"""Bytes for one batch of prompts."""

_USED = Path("/proc/self/statm")


@contextmanager
def bounded() -> Iterator[Callable[[], object]]:
    """Limit the memory that the body may add to the process, and the CPU time between calls of the yielded function.

    Has no effect outside the main thread, where Python handles no signals, and bounds memory on Linux alone.

    Raises:
        TimeoutError: the body took longer.
        MemoryError: the body needed more.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {SECONDS} s")

    previous = signal.signal(signal.SIGVTALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        if _USED.exists():
            most = int(_USED.read_text().split()[0]) * resource.getpagesize() + MEMORY
            limits = [limit for limit in (most, soft, hard) if limit != resource.RLIM_INFINITY]
            resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
        yield lambda: signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
