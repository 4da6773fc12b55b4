"""The trainer's handle on the server process that forks its workers."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Sequence

from app.import_path import import_path
from app.rewards.workers.task import COMMAND


class ForkServer:
    """Starts one light process (without torch), does not wait for it, and has it fork and kill workers.

    The server is a separate program, neither a fork nor a spawn of the trainer: it does not copy the trainer's
    memory, CUDA context and locks, and does not run its main script again.

    Args:
        modules: modules, or files of Python code, that it imports before the first fork.
        program: module whose main program the server is; it calls `app.rewards.workers.main.main` with what its
            workers do.
    """

    def __init__(self, modules: Sequence[str], program: str = "app.rewards.workers.main") -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", program, str(theirs.fileno()), str(os.getpid()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={
                    **os.environ,
                    "PYTHONPATH": import_path(),
                    "PYTHONHASHSEED": "0",  # sympy's results depend on the order of sets
                    "OMP_NUM_THREADS": "1",
                    "OPENBLAS_NUM_THREADS": "1",
                    "MKL_NUM_THREADS": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
                start_new_session=True,  # the trainer alone handles Ctrl-C
            )
        self._control = ours

    def fork(self) -> socket.socket:
        """Return a connection to a new worker, which starts as soon as the server gets to it.

        Raises:
            OSError: the server has ended.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [COMMAND.pack(b"F", 0)], [theirs.fileno()])
            except OSError:
                ours.close()
                raise
        return ours

    def kill(self, pid: int) -> None:
        """Kill a worker and its process group. Only the server can tell whether `pid` is still a child of its own."""
        with contextlib.suppress(OSError):  # the workers of a server that has ended are dead
            self._control.sendall(COMMAND.pack(b"K", pid))

    def close(self) -> None:
        """End the server and all its workers."""
        self._control.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
