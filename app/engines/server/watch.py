"""Runs a server for a trainer, and ends it with all its processes when the trainer ends, even by a crash.

Usage: `python watch.py FD COMMAND...`, where FD is the read end of a pipe whose write end the trainer holds open. This
program leads the process group that contains the server and its workers. It only uses the standard library.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time

GRACE = 10.0
"""Seconds that a server has to end after SIGTERM."""

_PR_SET_PDEATHSIG = 1


def main() -> None:
    pipe, command = int(sys.argv[1]), sys.argv[2:]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_end_with_parent)  # one thread here
    while server.poll() is None and not select.select([pipe], [], [], 0.5)[0]:
        pass
    if server.poll() is None:
        server.terminate()
        deadline = time.monotonic() + GRACE
        while server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
    # The workers of a killed server do not end on their own.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
    os.killpg(os.getpid(), signal.SIGKILL)


def _end_with_parent() -> None:
    """Have the kernel end the server if this program itself is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    main()
