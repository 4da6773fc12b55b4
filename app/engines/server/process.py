"""A server process that belongs to this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from app.engines.server import watch
from datamodules.errors import UserError


class ServerProcess:
    """A server in its own process group, which ends with this process at the latest.

    Args:
        command: the server's command line.
        environment: the server's complete environment.
        log: file that the server's output is appended to; None leaves it on the terminal.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path | None) -> None:
        self.log = log
        read_end, self._write_end = os.pipe()
        # Run by path: as a module it would import the package, and torch with it.
        watched = [sys.executable, "-P", watch.__file__, str(read_end), *command]
        output = None if log is None else log.open("ab")
        try:
            process = subprocess.Popen(
                watched,
                pass_fds=[read_end],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # Ctrl-C is for the trainer to handle
            )
        finally:
            os.close(read_end)
            if output is not None:
                output.close()
        self._process, self.pid = process, process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def log_end(self) -> str:
        """Return a sentence with the last line of the log."""
        if self.log is None or not self.log.exists():
            return "See its output."
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return f"Its log ends: {lines[-1].strip()[:300]}" if lines else "Its log is empty."

    def end(self) -> None:
        """Ask the server to end, without waiting for it. May be called twice."""
        if self._write_end >= 0:
            os.close(self._write_end)
            self._write_end = -1

    def close(self) -> None:
        """End the server. May be called twice."""
        self.end()
        try:
            self._process.wait(timeout=watch.GRACE + 5.0)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()


def free_port(host: str) -> int:
    """Return a port that is currently free on an address of this machine.

    Raises:
        UserError: this machine has no such address.
    """
    try:
        with socket.create_server((host, 0), family=_addresses(host)[0][0]) as found:
            port: int = found.getsockname()[1]
            return port
    except OSError as error:
        raise UserError(f"server.host is {host}, but cannot be listened on ({error.strerror}). Change it.") from error


def is_local(host: str) -> bool:
    """Return whether a server that listens on an address or host name can only be reached from this machine."""
    return all(ip_address(address).is_loopback for _, address in _addresses(host))


def _addresses(host: str) -> list[tuple[socket.AddressFamily, str]]:
    """Return family and address of every address that a server of this host listens on; "" is all of the machine's.

    Raises:
        UserError: there is none.
    """
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise UserError(f"server.host is {host!r}, which is no address ({error}). Change it.") from error
    return [(family, str(where[0]).partition("%")[0]) for family, *_, where in found]
