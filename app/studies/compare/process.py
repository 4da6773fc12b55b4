"""One `dots fit` at a time in a process of its own, which ends with the comparison."""

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

_PR_SET_PDEATHSIG = 1  # prctl(2)
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_TICK_S = 1.0


def fit(arguments: Sequence[str], log: Path, keep_open: int, tick: Callable[[], None]) -> int:
    """Run `dots fit ARGUMENTS --ckpt_path last` to its end and return its exit status.

    When the comparison is stopped, the run is asked to finish its step and save, and is waited for; `subprocess.run`
    would kill it. When the comparison is killed, Linux asks the run instead.

    Its output is appended to `log`; it holds the file descriptor `keep_open` until it ends. `tick` is called every
    second.
    """
    command = [sys.executable, "-m", "app", "fit", *arguments, "--ckpt_path", "last"]
    with log.open("ab") as out, subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, pass_fds=(keep_open,),
        preexec_fn=_end_with_parent if _LIBC else None,
    ) as process:  # fmt: skip
        try:
            while True:
                try:
                    return process.wait(_TICK_S)
                except subprocess.TimeoutExpired:
                    tick()
        finally:
            try:
                process.terminate()
                process.wait()
            except BaseException:  # a second Ctrl-C
                process.kill()
                raise


def _end_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def only_one(folder: Path, patience_s: float = 60.0) -> Iterator[int]:
    """Lock a folder for one comparison and its run; yield the descriptor through which the run holds the lock too.

    A run whose comparison was killed needs some seconds to save, so it is waited for.

    Raises UserError when the folder is still locked after `patience_s` seconds.
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
                        f"--out {folder} is in use by another dots compare or a run that it left. Wait for it, end it, "
                        "or give another folder."
                    ) from None
                time.sleep(0.2)
        os.set_inheritable(lock.fileno(), True)
        yield lock.fileno()
