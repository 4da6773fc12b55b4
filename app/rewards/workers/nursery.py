"""The trainer's handle on the process that forks its reward workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.connection import Connection

from app.rewards.workers.task import ORDER


class Nursery:
    """Starts one light process (no torch), without waiting for it, and has it fork and kill workers.

    It is a program of its own, not a fork or a spawn of the trainer: it neither copies the trainer's memory, CUDA
    context and locks nor runs its main script again.

    Args:
        modules: imported there before the first fork.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "app.rewards.workers.main",
                    str(theirs.fileno()),
                    str(os.getpid()),
                    *modules,
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=_environment(),
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )
        self._control = ours

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def fork(self) -> Connection:
        """A connection to a new worker, which is born as soon as the nursery gets to it.

        Raises:
            OSError: the nursery is gone.
        """
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(self._control, [ORDER.pack(b"F", 0)], [theirs.fileno()])
            return Connection(ours.detach())

    def kill(self, pid: int) -> None:
        """Kills a worker and everything in its process group. Only the nursery can know that `pid` is still its own."""
        with contextlib.suppress(OSError):  # a nursery that is gone took its workers along
            self._control.sendall(ORDER.pack(b"K", pid))

    def close(self) -> None:
        """Ends it and all its workers."""
        self._control.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _environment() -> dict[str, str]:
    path = [os.path.abspath(entry) for entry in sys.path]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(dict.fromkeys([*path, os.getcwd()])),
        "PYTHONHASHSEED": "0",  # sympy's results depend on the order of sets
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
