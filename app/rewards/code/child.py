"""Run generated programs, each in processes of its own: `python -sP child.py LEVEL PATH...`, started by `Sandbox`.

A request is two frames on the socket that is standard input: what is to run, and its tests. This process forks a
supervisor for each, which starts the program, only then reads the tests, and runs them in a second process that calls
the program's functions (`calls.py`): no process that runs generated code ever holds a test or an expected answer.
Imports the standard library only.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import os
import random
import resource
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from app.rewards.code import calls, kernel
else:  # the package itself would import NumPy
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import calls
    import kernel

    sys.path.pop(0)

PRELOAD = (
    "bisect",
    "collections",
    "copy",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "re",
    "string",
)
"""What programs often import, so that each needn't."""
FILE_BYTES = 16 * 2**20
"""Largest file, and so the longest output."""
FOLDER_BYTES = 4 * FILE_BYTES
FILES = 4096
PATH_CHARACTERS = 1024
OPEN_FILES = 64
PROCESSES = 64
_TICK = 0.05
"""Seconds between two looks at the clock and the folder."""
_READY = b"ready"
SIZE = struct.Struct("!I")


def main(level: str, visible: Sequence[str]) -> None:
    """Serve requests until the other end closes."""
    channel = socket.socket(fileno=0)
    try:
        if level == "namespaces":
            kernel.enter_namespaces(visible)
        kernel.hide_memory()
        for module in PRELOAD:
            importlib.import_module(module)
        gc.collect()
        gc.freeze()  # otherwise garbage collection in the forks would copy the shared pages
        while True:
            request = receive(channel)
            supervisor = os.fork()
            if supervisor == 0:
                _supervise(channel, level, visible, request)
            if os.waitpid(supervisor, 0)[1]:
                return
    except EOFError:
        return
    except OSError as error:
        send(channel, {"failed": str(error)})


def receive(channel: socket.socket) -> Any:
    """Return the next frame. Reads nothing beyond it, so that a fork before the next one does not know that."""

    def exactly(count: int) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if not (part := channel.recv(count - len(parts))):
                raise EOFError
            parts += part
        return bytes(parts)

    return json.loads(exactly(SIZE.unpack(exactly(SIZE.size))[0]))


def send(channel: socket.socket, message: object) -> None:
    data = json.dumps(message).encode()
    channel.sendall(SIZE.pack(len(data)) + data)


def _supervise(channel: socket.socket, level: str, visible: Sequence[str], request: dict[str, Any]) -> None:
    """Run one request in a fork, answer it and exit; with a status that is not 0 if that could not be done."""
    status = 1
    try:
        if level == "namespaces":
            kernel.enter_new_processes(FOLDER_BYTES, FILES)
        kernel.adopt_orphans()
        # To remove folders however deep.
        sys.setrecursionlimit(10**6)
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            reply = _run(channel, level, [*visible, folder], request)
        send(channel, reply)
        status = 0
    except Exception as error:  # noqa: BLE001 (whatever it is, the trainer is told)
        send(channel, {"failed": f"{type(error).__name__}: {error}"})
    finally:
        os._exit(status)


def _run(channel: socket.socket, level: str, visible: Sequence[str], request: dict[str, Any]) -> dict[str, Any]:
    running: list[int] = []
    late = False

    def kill() -> None:
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def watch(*_: object) -> None:
        nonlocal late
        late = time.monotonic() > deadline
        if late or (level in ("filters", "seccomp", "none") and _too_full(visible[-1])):
            kill()

    deadline = time.monotonic() + request["seconds"]
    signal.signal(signal.SIGALRM, watch)
    signal.setitimer(signal.ITIMER_REAL, min(request["seconds"], _TICK), _TICK)
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, open(os.devnull, "wb") as nothing:
        given.write(request["stdin"].encode())
        given.seek(0)
        ours, theirs = socket.socketpair()
        confined, confining = os.pipe()

        def start(out: int, connection: socket.socket, telling: int, target: Callable[[Any], None], what: Any) -> None:
            process = os.fork()
            if process == 0:
                files = (given.fileno(), out, nothing.fileno(), connection.fileno(), telling)
                _confined(level, visible, request, files, partial(target, what))
            running.append(process)

        if request["tests"]:
            start(nothing.fileno(), theirs, confining, calls.serve, request["source"])
        else:
            start(output.fileno(), theirs, confining, _script, request["source"])
        os.close(confining)
        tests = receive(channel)  # not before the program has its process, which must not know them
        if (said := os.read(confined, 1000)) != _READY and not late:
            raise OSError(said.decode() or "a program could not be started")
        status = 1
        with contextlib.suppress(ChildProcessError):
            if request["tests"]:
                try:
                    start(output.fileno(), ours, nothing.fileno(), calls.test, tests)
                except OSError:  # none can start in a process namespace whose first, the program, has ended
                    os.waitpid(running[0], 0)
                    if late:
                        raise
            theirs.close()
            ours.close()
            _, status = os.waitpid(running[-1], 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        kill()
        kernel.kill_children()
        output.seek(0)
        text = output.read(FILE_BYTES).decode(errors="replace")
        return {"output": text, "status": status, "timed_out": late}


def _too_full(folder: str) -> bool:
    size, left = 0, [folder]
    while left and size <= FOLDER_BYTES:
        with contextlib.suppress(OSError), os.scandir(left.pop()) as entries:
            for entry in entries:
                if len(entry.path) > PATH_CHARACTERS:  # the time to look is quadratic in the depth
                    return True
                size += max(entry.stat(follow_symlinks=False).st_size, FOLDER_BYTES // FILES)
                left += [entry.path] if entry.is_dir(follow_symlinks=False) else []
    return size > FOLDER_BYTES


def _confined(
    level: str,
    visible: Sequence[str],
    request: dict[str, Any],
    files: Sequence[int],
    target: Callable[[], None],
) -> None:
    """Give up all rights in this fork, then call the target on what is left, and exit."""
    status = 1
    try:
        os.setsid()
        os.chdir(visible[-1])
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for place, one in enumerate([fcntl.fcntl(file, fcntl.F_DUPFD, OPEN_FILES) for file in files]):
            os.dup2(one, place)
        os.closerange(len(files), 2**20)
        for name, most in {
            "AS": request["memory"],
            "CPU": int(request["seconds"]) + 1,
            "FSIZE": FILE_BYTES,
            "NOFILE": OPEN_FILES,
            "CORE": 0,
            # Elsewhere the processes of the user's other programs count, too.
            **({"NPROC": PROCESSES} if level == "namespaces" else {"NPROC": 4096} if level == "none" else {}),
        }.items():
            kind = getattr(resource, f"RLIMIT_{name}")
            hard = resource.getrlimit(kind)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(kind, (most, most))
        if level != "none":
            kernel.give_up_rights(files=visible if level == "filters" else None)
        random.seed(0)
        atexit._clear()  # what this process has registered
        sys.setrecursionlimit(1000)
        os.write(4, _READY)
        os.close(4)
        try:
            target()
            status = 0
        except SystemExit as stop:
            status = 0 if stop.code in (None, 0) else 1
        atexit._run_exitfuncs()
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError):  # the program has begun, and 4 is closed
            os.write(4, str(error).encode())
        status = 1
    except BaseException:  # noqa: BLE001 (the program's own)
        status = 1
    finally:
        os._exit(status)


def _script(source: Sequence[str]) -> None:
    """Run a program that reads standard input and writes standard output."""
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    for part in source:
        exec(compile(part, "program.py", "exec", dont_inherit=True), main.__dict__)
    for thread in threading.enumerate():  # as the interpreter does at its end
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
