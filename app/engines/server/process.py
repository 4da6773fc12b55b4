"""A server that belongs to this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from app.engines.server import watch


class ServerProcess:
    """Starts a server in a process group of its own, and ends the whole group with this process at the latest.

    Args:
        command: what to run.
        environment: all of it.
        log: file that its output is appended to; None leaves it on the terminal.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> None:
        self.log = log
        theirs, self._ours = os.pipe()
        # By its path: as a module it would import the package, and torch with it.
        watched = [sys.executable, "-P", watch.__file__, str(theirs), *command]
        output = None if log is None else log.open("ab")
        try:
            self._process = subprocess.Popen(
                watched,
                pass_fds=[theirs],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is the trainer's to handle
            )
        finally:
            os.close(theirs)
            if output is not None:
                output.close()

    @property
    def pid(self) -> int:
        """Of the group's leader."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def last_line(self) -> str:
        """What the log says at its end."""
        if self.log is None or not self.log.exists():
            return "see its output"
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else "its log is empty"

    def close(self) -> None:
        """Ends it. May be called twice."""
        if self._ours >= 0:
            os.close(self._ours)
            self._ours = -1
        try:
            self._process.wait(timeout=watch.GRACE + 5.0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def free_port(host: str) -> int:
    """A port of this machine that nobody listens on now."""
    with socket.create_server((host, 0)) as found:
        port: int = found.getsockname()[1]
        return port


def import_path() -> str:
    """A PYTHONPATH under which a child finds what this process can import, the current folder included."""
    entries = [os.path.abspath(entry) for entry in sys.path]
    return os.pathsep.join(dict.fromkeys([*entries, os.getcwd()]))
