"""What worker processes print, passed on to their server's standard error up to a limit."""

from __future__ import annotations

import contextlib
import os
import selectors
import sys

_CHUNK = 4096
"""Bytes that a pipe which is ready for writing takes without blocking (PIPE_BUF)."""


class Outputs:
    """Pipes that workers write to in place of the server's standard output and standard error.

    What a worker, or anything that it starts, prints beyond the limit is read and left out, so that it never waits. So
    is what standard error cannot take at the moment: the server has to stay able to kill.

    Args:
        selector: the server's; the pipes are registered in it, with this object as their data.
        limit: bytes that one worker may print while it lives.
    """

    def __init__(self, selector: selectors.BaseSelector, limit: int) -> None:
        self._selector, self._limit = selector, limit
        self._left: dict[int, int] = {}

    def open(self) -> int | None:
        """Return a descriptor for a new worker's output; None if the system has none left, so that nothing is bound."""
        try:
            reading, writing = os.pipe()
        except OSError:
            return None
        self._left[reading] = self._limit
        self._selector.register(reading, selectors.EVENT_READ, self)
        return writing

    def close_all(self) -> None:
        """Close the server's ends, in a worker, which has inherited them."""
        for reading in self._left:
            os.close(reading)

    def pass_on(self, reading: int) -> None:
        """Read what is there and pass it on."""
        data = os.read(reading, _CHUNK)
        if not data:
            self._selector.unregister(reading)
            os.close(reading)
            del self._left[reading]
            return
        left = self._left[reading]
        if left <= 0:
            return
        self._left[reading] = left - len(data)
        _write(data[:left])
        if len(data) >= left:
            _write(f"\n[a process printed more than {self._limit} bytes, the rest is left out]\n".encode())


def _write(data: bytes) -> None:
    with contextlib.suppress(OSError), selectors.DefaultSelector() as ready:
        with contextlib.suppress(PermissionError):  # files are always ready, and cannot be waited for
            ready.register(sys.stderr.fileno(), selectors.EVENT_WRITE)
        if not ready.get_map() or ready.select(0):
            os.write(sys.stderr.fileno(), data)
