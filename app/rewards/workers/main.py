"""The fork server: `python -m app.rewards.workers.main FD PARENT MODULE...`, run by `ForkServer`.

The server imports slow libraries once and forks a worker for each socket that it receives, so that replacing a killed
worker takes milliseconds. That of rewards never imports users' code: a function that hangs on import, or that starts
CUDA or threads, does so in a worker. That of environments (`app.environments.worker`) does, since every conversation
has a worker of its own. Each worker leads a session and dies with the server, which ends with the trainer. On
Linux all that a worker has started stays its descendant, even in sessions of their own, becomes a child of the server
when the worker dies, and is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from app.rewards.workers.outputs import Outputs
from app.rewards.workers.task import COMMAND
from app.user_code import import_code

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_HIGH_DESCRIPTOR = 512
"""A worker's socket lies above what code that closes or writes to the descriptors of its parent usually touches."""
_LAST_SECONDS = 0.8


def main(arguments: Sequence[str], serve: Callable[[socket.socket], None], max_output_bytes: int | None = None) -> None:
    """Fork and kill workers on command until the trainer closes its end or ends.

    Args:
        arguments: those of the command line.
        serve: what a worker does with its connection.
        max_output_bytes: bytes that a worker may print; None for no limit.
    """
    control_fd, parent, modules = int(arguments[0]), int(arguments[1]), arguments[2:]
    _keep_orphans()
    for module in modules:
        with contextlib.suppress(BaseException):  # the worker that needs it meets the same error, and reports it
            import_code(module)
    sys.stdout.flush()  # what is left in the buffer would be printed by every worker
    gc.collect()
    gc.freeze()  # otherwise garbage collection in the workers would copy the shared pages
    control = socket.socket(fileno=control_fd)
    workers = _children()  # what the modules have started lives as long as the server
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    outputs = None if max_output_bytes is None else Outputs(selector, max_output_bytes)
    over = False
    while os.getppid() == parent and not over:
        ready = [key for key, _ in selector.select(1.0)]
        _reap(workers)
        for key in ready:
            if outputs is not None and key.data is outputs:
                outputs.pass_on(key.fd)
            elif not _execute_command(control, workers, serve, selector, outputs):
                over = True
    deadline = time.monotonic() + _LAST_SECONDS
    for worker in workers:
        _kill(worker)
    while _reap(workers) and time.monotonic() < deadline:
        time.sleep(0.01)


def _keep_orphans() -> None:
    """Become the parent of what descendants leave behind when they end, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


def _reap(workers: set[int]) -> bool:
    """Bury dead children and kill what workers that have died left behind. Return whether any child is left."""
    died = False
    while True:
        try:
            child, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if not child:
            break
        died = True
        if child in workers:
            workers.remove(child)
            _kill(child)  # its process group may have survived it
    if died:
        for child in _children() - workers:
            _kill(child)
    return True


def _children() -> set[int]:
    """Return the ids of this process's children, where the system has `/proc`."""
    found, me = set(), str(os.getpid())
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError):
            if entry.read_text().rpartition(")")[2].split()[1] == me:
                found.add(int(entry.parent.name))
    return found


def _execute_command(
    control: socket.socket,
    workers: set[int],
    serve: Callable[[socket.socket], None],
    selector: selectors.BaseSelector,
    outputs: Outputs | None,
) -> bool:
    """Receive and execute one command. Return False when the trainer has closed its end."""
    data, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if not data:
        return False
    command, pid = COMMAND.unpack(data)
    if command == b"K":
        if pid in workers:
            _kill(pid)
        return True
    server, printing = os.getpid(), None if outputs is None else outputs.open()
    child = os.fork()
    if child == 0:
        control.close()
        selector.close()
        if outputs is not None:
            outputs.close_all()
        if printing is not None:
            for standard in (1, 2):
                os.dup2(printing, standard)
            os.close(printing)
        _run_worker(descriptors[0], server, serve)
    os.close(descriptors[0])
    if printing is not None:
        os.close(printing)
    workers.add(child)
    return True


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not lead its process group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


def _run_worker(descriptor: int, server: int, serve: Callable[[socket.socket], None]) -> None:
    """Serve one connection, then exit: never return into the server's loop."""
    status = 1
    try:
        os.setsid()
        _keep_orphans()
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it ended before the signal was set
            os._exit(0)
        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with contextlib.suppress(OSError, ValueError):  # a lower limit leaves it where it is
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, 2 * _HIGH_DESCRIPTOR), most))
            high = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH_DESCRIPTOR)
            os.close(descriptor)
            descriptor = high
        serve(socket.socket(fileno=descriptor))
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:  # noqa: BLE001 (it ends the process)
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    from app.rewards.workers.serving import serve

    main(sys.argv[1:], serve)
