"""Processes that run generated programs, and how far the system keeps those from doing harm."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from datamodules.errors import UserError

Isolation = Literal["auto", "namespaces", "bubblewrap", "filters", "seccomp", "none"]

LEVELS: dict[str, str] = {
    "namespaces": "in namespaces of their own: no network, no other processes, no files but the system's, read-only",
    "bubblewrap": "in bubblewrap: no network, no other processes, no files but the system's, read-only",
    "filters": "without namespaces, which this system does not give: seccomp denies network, processes and signals, "
    "Landlock denies files but the system's",
    "seccomp": "WITHOUT PROTECTION OF FILES, as this system gives neither namespaces nor Landlock: they can read and "
    "write yours, while seccomp denies network, processes and signals. Run in a container without secrets",
    "none": "WITHOUT ISOLATION, only with limits of time and memory: they can use your files, processes and network. "
    "Run in a container without secrets",
}
"""What is said of each isolation, best first."""

_GRACE = 2.0
"""Seconds beyond its limit after which the process around a program is given up."""
_TRIAL_SECONDS = 10.0


@dataclass(frozen=True)
class Ran:
    """What a program did.

    Attributes:
        output: what it printed; if it was run for tests, 1 or 0 for each that ended.
        status: 0 if it ended in the normal way.
        timed_out: whether it was stopped at its time limit.
    """

    output: str
    status: int
    timed_out: bool


class _Process:
    """One process of `child.py`, which runs one program at a time."""

    def __init__(self, level: str) -> None:
        ours, theirs = socket.socketpair()
        visible = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", sys.base_prefix, sys.prefix]
        command = [sys.executable, "-sP", str(Path(__file__).with_name("child.py")), level, *visible]
        if level == "bubblewrap":
            binds = [word for path in (*visible, str(Path(__file__).parent)) for word in ("--ro-bind-try", path, path)]
            places = ["--dev", "/dev", "--proc", "/proc", "--size", str(64 * 2**20), "--tmpfs", "/tmp", *binds]
            command = ["bwrap", "--unshare-all", "--die-with-parent", *places, "--chdir", "/", *command]
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "PATH", "TMPDIR") if name in os.environ}
        fixed = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        with theirs:
            self._process = subprocess.Popen(
                command,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=kept | fixed,
                cwd="/",
            )
        self._socket = ours

    async def open(self) -> Self:
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        return self

    async def run(self, request: dict[str, object], tests: Sequence[str]) -> Ran:
        for part in (request, tests):
            data = json.dumps(part).encode()
            self._writer.write(len(data).to_bytes(4, "big") + data)
        size = int.from_bytes(await self._reader.readexactly(4), "big")
        reply = json.loads(await self._reader.readexactly(size))
        if "failed" in reply:
            raise OSError(reply["failed"])
        return Ran(**reply)

    def close(self) -> None:
        self._writer.transport.abort()
        self._process.kill()
        self._process.wait()


class Sandbox:
    """Runs programs, several at once.

    Args:
        isolation: how they are isolated; "auto" takes the best that the system offers.
        memory_limit_mb: address space of each, in MiB.
    """

    def __init__(self, isolation: Isolation, memory_limit_mb: int) -> None:
        self._memory = memory_limit_mb * 2**20
        self._idle: list[_Process] = []
        self.level: str = isolation

    async def start(self) -> str:
        """Find the isolation, and say it in a sentence. Raises UserError if it is not available."""
        errors: list[str] = []
        for level in [*LEVELS] if self.level == "auto" else [self.level]:
            self.level = level
            try:
                if (await self.run(["print(1)"], _TRIAL_SECONDS)).output == "1\n":
                    return f"Generated programs run {LEVELS[self.level]}."
                errors.append(f"{self.level}: a program of one line did not run")
            except OSError as error:
                errors.append(f"{self.level}: {error}")
        raise UserError(
            f"Programs cannot be isolated as asked ({'; '.join(errors)}). Set isolation of app.rewards.Code to auto, "
            "or run on a system that has it."
        )

    async def run(self, source: Sequence[str], seconds: float, stdin: str = "", tests: Sequence[str] = ()) -> Ran:
        """Run the parts of a program one after the other, once with an input or for all tests.

        Raises:
            OSError: it could not be run, for a reason that is not its own.
        """
        if seconds <= 0:
            return Ran("", 1, timed_out=True)
        process = self._idle.pop() if self._idle else await _Process(self.level).open()
        request = {"source": source, "stdin": stdin, "seconds": seconds, "memory": self._memory, "tests": bool(tests)}
        try:
            ran = await asyncio.wait_for(process.run(request, tests), seconds + _GRACE)
        except BaseException as error:
            process.close()
            if isinstance(error, asyncio.IncompleteReadError | TimeoutError | ConnectionError):
                raise OSError("the process that runs programs has ended or hangs") from error
            raise
        self._idle.append(process)
        return ran
