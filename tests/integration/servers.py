"""vLLM servers of runs that this process has started."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def engines(of: int | None = None) -> list[psutil.Process]:
    """The servers' inner processes, below this process or another one."""
    return [each for each in psutil.Process(of).children(recursive=True) if "EngineCore" in each.name()]


@contextmanager
def killed_when(sign: Path, timeout: float = 400) -> Iterator[list[int]]:
    """Kills the engines of all servers once a file is there; their ids, after the block. None after the timeout."""
    deadline = time.monotonic() + timeout
    killed: list[int] = []

    def kill() -> None:
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for each in engines() if sign.exists() else []:
            each.kill()
            killed.append(each.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        killer.join()
