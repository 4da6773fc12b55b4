"""One `dots fit` in a process of its own, which does not outlive the comparison."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from datamodules.errors import UserError

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl(2)
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_TICK_S = 1.0


def run_fit(arguments: Sequence[str], log: Path, keep_open: int, tick: Callable[[], None]) -> int:
    """Runs `dots ARGUMENTS` to its end and returns its exit status.

    When the comparison is stopped the run is asked to end its step and save, and waited for. When the comparison is
    killed, Linux asks it instead.

    Args:
        arguments: of `dots`.
        log: takes what it prints, behind what is there.
        keep_open: a file descriptor that the run keeps as long as it lives.
        tick: called every second meanwhile.
    """
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "app", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            pass_fds=(keep_open,),
            preexec_fn=_end_with_parent if _LIBC else None,
        )
    try:
        while True:
            try:
                return process.wait(_TICK_S)
            except subprocess.TimeoutExpired:
                tick()
    finally:
        if process.poll() is None:
            _stop(process)


def _end_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_DEATH_SIGNAL, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        process.terminate()
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextmanager
def only_one(folder: Path, patience_s: float = 60.0) -> Iterator[int]:
    """Holds a folder for one comparison and its run; yields the descriptor by which the run holds it too.

    A run that a killed comparison has left behind takes some seconds to save: it is waited for.

    Raises UserError when the folder is still held after `patience_s` seconds.
    """
    deadline = time.monotonic() + patience_s
    with (folder / ".lock").open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"--out {folder}: another dots compare, or a run that it left, is at work there; wait for it, "
                        "end it, or give another folder"
                    ) from None
                time.sleep(0.2)
        os.set_inheritable(lock.fileno(), True)
        yield lock.fileno()
