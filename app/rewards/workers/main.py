"""The fork server and its workers: `python -m app.rewards.workers.main FD PARENT MODULE...`, run by `ForkServer`.

The server imports slow libraries once and forks a worker for each socket that it receives, so that replacing a killed
worker takes milliseconds. It never imports users' code: a function that hangs on import, or that starts CUDA or
threads, does so in a worker. Each worker leads a session and dies with the server, which ends with the trainer. On
Linux all that a worker has started stays its descendant, even in sessions of their own, becomes a child of the server
when the worker dies, and is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import math
import os
import pickle
import random
import resource
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np

from app.rewards.base import Reward
from app.rewards.workers import frames
from app.rewards.workers.results import checked
from app.rewards.workers.task import COMMAND, MAX_METRIC, MAX_REPLY_BYTES, Call, Loggable, Reply, Setup
from app.rewards.workers.trial import check_arguments, check_missing_column, check_result
from datamodules.errors import UserError

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
_HIGH_DESCRIPTOR = 512
"""A worker's socket lies above what code that closes or writes to the descriptors of its parent usually touches."""
_MAX_TRACEBACK = 20_000
_MAX_NAMES = 100
_MAX_NOTES = 5
_LAST_SECONDS = 0.8


def main(control_fd: int, parent: int, modules: Sequence[str]) -> None:
    """Fork and kill workers on command until the trainer closes its end or ends."""
    _keep_orphans()
    for module in modules:
        with contextlib.suppress(ImportError):  # the worker that needs it reports the error
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # otherwise garbage collection in the workers would copy the shared pages
    control = socket.socket(fileno=control_fd)
    workers: set[int] = set()
    while os.getppid() == parent:
        readable, _, _ = select.select([control], [], [], 1.0)
        _reap(workers)
        if readable and not _execute_command(control, workers):
            break
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


def _execute_command(control: socket.socket, workers: set[int]) -> bool:
    """Receive and execute one command. Return False when the trainer has closed its end."""
    data, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if not data:
        return False
    command, pid = COMMAND.unpack(data)
    if command == b"K":
        if pid in workers:
            _kill(pid)
        return True
    server = os.getpid()
    child = os.fork()
    if child == 0:
        control.close()
        _run_worker(descriptors[0], server)
    os.close(descriptors[0])
    workers.add(child)
    return True


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not lead its process group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


def _run_worker(descriptor: int, server: int) -> None:
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


def serve(connection: socket.socket) -> None:
    """Load the rewards, then answer calls until the other end closes."""

    def tell(reply: Reply) -> None:
        frames.send(connection, frames.SETUP, reply.encode())

    tell(Reply("started", pid=os.getpid()))
    setup: Setup = pickle.loads(frames.receive(connection)[1])  # noqa: S301 (from the trainer, over a private socket)
    limit = setup.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rewards = []
    for position, pickled in enumerate(setup.rewards):
        tell(Reply("loading", reward=position))
        try:
            reward = pickle.loads(pickled)  # noqa: S301 (from the trainer, over a private socket)
            reward.load()
        except UserError as error:
            return tell(Reply("unusable", error=str(error)))
        except BaseException as error:  # noqa: BLE001 (a reward may raise anything)
            return tell(Reply("unloadable", error=_line(error), traceback=traceback.format_exc()[-_MAX_TRACEBACK:]))
        rewards.append(reward)
    tell(Reply("ready"))
    me = os.getpid()
    while True:
        number, request = frames.receive(connection)
        for reply in answers(rewards, request):
            if os.getpid() != me:  # a fork that the reward has let return here
                os._exit(0)
            frames.send(connection, number, within_limit(reply))


def answers(rewards: Sequence[Reward], request: bytes) -> Iterator[Reply]:
    """Yield the replies to a pickled `Call`; see `Reply`."""
    call: Call = pickle.loads(request)  # noqa: S301 (from the trainer, over a private socket)
    reward, count = rewards[call.reward], len(call)
    if not call.one_by_one:
        yield from _attempt(reward, call, 0)
        return
    for row in range(count):
        if not reward.one_by_one:  # what it has changed in its arguments must not reach the next completion
            call = pickle.loads(request)  # noqa: S301 (as above)
        yield from _attempt(reward, call.rows(row, row + 1), row)


def _attempt(reward: Reward, call: Call, row: int) -> Iterator[Reply]:
    """Yield the replies to a call, the last of which says how it ended."""
    try:
        yield from score(reward, call, row)
    except UserError as error:
        yield Reply("unusable", row=row, error=str(error))
    except BaseException as error:  # noqa: BLE001 (a reward may raise anything)
        yield Reply("raised", row=row, error=_line(error), traceback=traceback.format_exc()[-_MAX_TRACEBACK:])


def _line(error: BaseException) -> str:
    """Return type and message of an exception, and the innermost line of code that no package installs."""
    told = " ".join("".join(traceback.format_exception_only(error)).split())[:300]
    installed = (sys.prefix, sys.base_prefix, str(Path(__file__).parents[1]), "<")
    places = [one for one in traceback.extract_tb(error.__traceback__) if not one.filename.startswith(installed)]
    return f"{told} ({Path(places[-1].filename).name}, line {places[-1].lineno})" if places else told


def within_limit(reply: Reply) -> bytes:
    """Encode a reply, without what the reward has logged where that makes it larger than `MAX_REPLY_BYTES`."""
    encoded = reply.encode()
    if len(encoded) <= MAX_REPLY_BYTES:
        return encoded
    note = f"logged {len(encoded) >> 20} MiB in one call, more than the {MAX_REPLY_BYTES >> 20} MiB allowed: left out"
    return Reply(reply.kind, row=reply.row, scores=reply.scores, invalid=reply.invalid, notes=[note]).encode()


def score(reward: Reward, call: Call, row: int = 0) -> Iterator[Reply]:
    """Run the reward on the call's completions and check what it returns. Yield what a generator yields at once.

    Args:
        reward: a loaded reward.
        call: `N` completions, which the reward may change.
        row: position of the first, for the replies.
    """
    random.seed(call.seed)
    np.random.seed(call.seed % 2**32)
    count = len(call)
    texts = list(map(str, call.completions)) if call.trial else []
    log = FunctionLog(count)
    arguments = {
        **call.columns,
        "prompts": call.prompts,
        "completions": call.completions,
        "completion_ids": [ids.tolist() for ids in call.completion_ids],
        "trainer_state": call.state,
        "log_extra": log.log_extra,
        "log_metric": log.log_metric,
    }
    arguments.pop(_name_of_self(type(reward)), None)
    if call.trial:
        check_arguments(reward, arguments)
    try:
        returned: object = reward(**arguments)
        if isinstance(returned, Iterator):
            yielded: list[object] = []
            for value in islice(returned, count + 1):
                scores, errors = checked([value], 1)
                if len(yielded) < count and not errors:
                    yield Reply("partial", row=row + len(yielded), scores=scores)
                yielded.append(value)
            returned = yielded
    except KeyError as error:
        if call.trial:
            check_missing_column(reward, error, arguments, texts)
        raise
    if call.trial:
        check_result(reward, returned, count)
    scores, errors = checked(returned, count)
    invalid = {str(position): error for position, error in errors.items()}
    yield Reply(
        "scores", row=row, scores=scores, invalid=invalid, metrics=log.metrics, extras=log.extras, notes=log.notes
    )


@cache
def _name_of_self(kind: type[Reward]) -> str:
    """Return the argument of `__call__` that takes the reward itself, which a column must not take; "" if none can."""
    own = next(iter(inspect.signature(kind.__call__).parameters.values()))
    return "" if own.kind is own.POSITIONAL_ONLY else own.name


class FunctionLog:
    """Collects what a function logs through TRL's two callbacks about the `count` completions of a call.

    What cannot be logged is left out, with a note, since it says nothing about the scores.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.extras: dict[str, list[Loggable]] = {}
        self.notes: list[str] = []
        self._metrics: dict[str, list[float]] = {}  # sum and number of the values

    @property
    def metrics(self) -> list[tuple[str, float]]:
        """The mean of the values given for each name."""
        return [(name, total / number) for name, (total, number) in self._metrics.items()]

    def log_metric(self, name: str, value: float) -> None:
        if not self._usable("log_metric", name, self._metrics):
            return
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= MAX_METRIC:
            self._note(f"log_metric({name!r}) got a value that is not a finite number of float32: left out")
            return
        sums = self._metrics.setdefault(name, [0.0, 0])
        sums[0] += number
        sums[1] += 1

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.count} completions")
        if self._usable("log_extra", column, self.extras):
            self.extras[column] = [_loggable(value) for value in values]

    def _usable(self, function: str, name: object, known: Mapping[str, object]) -> bool:
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAMES or not name.isprintable():
            self._note(f"{function} got a name that is not text of 1 to {_MAX_NAMES} printable characters: left out")
            return False
        if name not in known and len(known) >= _MAX_NAMES:
            self._note(f"{function} got more than {_MAX_NAMES} names in one call: the others are left out")
            return False
        return True

    def _note(self, note: str) -> None:
        if note not in self.notes and len(self.notes) < _MAX_NOTES:
            self.notes.append(note)


def _loggable(value: object) -> Loggable:
    """Return a value as the completions table can hold it: as it is, or as text."""
    value = value.item() if isinstance(value, np.generic) else value
    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    try:
        return str(value)
    except Exception:  # noqa: BLE001 (a user's class, or a number of too many digits)
        return f"<{type(value).__name__}>"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
