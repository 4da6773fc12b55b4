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
    """Kills the engines started in the block once a file is there; their ids, after it. None when it never is."""
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
