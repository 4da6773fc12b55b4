"""vLLM servers of runs that a test has started."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


def engines(of: int | None = None) -> list[psutil.Process]:
    """Return the servers' engine processes among the descendants of this process or of another one."""
    return [each for each in psutil.Process(of).children(recursive=True) if "EngineCore" in each.name()]


@contextmanager
def killed_when(sign: Path, timeout: float = 400) -> Iterator[list[int]]:
    """Kill the engines started in the block as soon as a file exists. Yield a list that receives their process IDs."""
    deadline = time.monotonic() + timeout
    killed: list[int] = []
    others = {each.pid for each in engines()}

    def kill() -> None:
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for each in engines() if sign.exists() else []:
            if each.pid not in others:
                each.kill()
                killed.append(each.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        yield killed
    finally:
        killer.join()
