"""The fork server and its workers: `python -m app.rewards.workers.main FD PARENT MODULE...`, run by `ForkServer`.

The server imports slow libraries once and forks a worker for each socket that it receives, so that replacing a killed
worker takes milliseconds. It never imports users' code: a function that hangs on import, or that starts CUDA or
threads, does so in a worker. Each worker leads a process group and dies with the server, which ends with the trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import math
import os
import pickle
import random
import resource
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from app.rewards.base import Reward, Scores
from app.rewards.workers.task import COMMAND, Call, Loggable, Reply, Setup
from datamodules.errors import UserError

PR_SET_PDEATHSIG = 1
MAX_REPLY_BYTES = 16 * 2**20
"""Keeps what a function logs from filling the trainer's memory; the scores of a chunk take a few hundred bytes."""
_MAX_TRACEBACK = 20_000


def main(control_fd: int, parent: int, modules: Sequence[str]) -> None:
    """Fork and kill workers on command until the trainer closes its end or ends."""
    for module in modules:
        with contextlib.suppress(ImportError):  # the worker that needs it reports the error
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # otherwise garbage collection in the workers would copy the shared pages
    control = socket.socket(fileno=control_fd)
    children: set[int] = set()
    while os.getppid() == parent:
        readable, _, _ = select.select([control], [], [], 1.0)
        for child in list(children):
            if os.waitpid(child, os.WNOHANG)[0]:
                children.remove(child)
                _kill(child)  # processes that it started may have survived it
        if readable and not _execute_command(control, children):
            break
    for child in children:
        _kill(child)


def _execute_command(control: socket.socket, children: set[int]) -> bool:
    """Receive and execute one command. Return False when the trainer has closed its end."""
    data, descriptors, _, _ = socket.recv_fds(control, COMMAND.size, 1)
    if not data:
        return False
    command, pid = COMMAND.unpack(data)
    if command == b"K":
        if pid in children:
            _kill(pid)
        return True
    server = os.getpid()
    child = os.fork()
    if child == 0:
        control.close()
        _run_worker(descriptors[0], server)
    os.close(descriptors[0])
    children.add(child)
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
        if sys.platform == "linux":
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != server:  # it ended before the signal was set
            os._exit(0)
        serve(Connection(descriptor))
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:  # noqa: BLE001 (it ends the process)
        traceback.print_exc()
    finally:
        os._exit(status)


def serve(connection: Connection) -> None:
    """Load the rewards, then answer calls until the other end closes."""
    send(connection, Reply("started", pid=os.getpid()))
    setup: Setup = connection.recv()
    limit = setup.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rewards = []
    for position, pickled in enumerate(setup.rewards):
        send(connection, Reply("loading", reward=position))
        try:
            reward = pickle.loads(pickled)  # noqa: S301 (from the trainer, over a private socket)
            reward.load()
        except UserError as error:
            return send(connection, Reply("unusable", error=str(error)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a reward may raise anything)
            return send(connection, Reply("unloadable", error=_line(error), traceback=traceback.format_exc()))
        rewards.append(reward)
    send(connection, Reply("ready"))
    while True:
        request = connection.recv_bytes()
        try:
            call: Call = pickle.loads(request)  # noqa: S301 (from the trainer, over a private socket)
            answer = score(rewards[call.reward], call)
        except UserError as error:
            answer = Reply("unusable", error=str(error))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (a reward may raise anything)
            answer = Reply("raised", error=_line(error), traceback=traceback.format_exc()[-_MAX_TRACEBACK:])
        send(connection, answer)


def _line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())[:300]


def send(connection: Connection, reply: Reply) -> None:
    """Send a reply to the trainer. One larger than `MAX_REPLY_BYTES` is replaced by a failure of the reward."""
    encoded = reply.encode()
    if len(encoded) > MAX_REPLY_BYTES:
        error = f"logged {len(encoded) >> 20} MiB, more than the {MAX_REPLY_BYTES >> 20} MiB allowed; log less"
        encoded = Reply("raised", error=error, traceback=error).encode()
    connection.send_bytes(encoded)


def score(reward: Reward, call: Call) -> Reply:
    """Run the reward on the call's completions and check what it returns."""
    random.seed(call.seed)
    np.random.seed(call.seed % 2**32)
    log = FunctionLog(len(call))
    returned = reward(
        **call.columns,
        prompts=call.prompts,
        completions=call.completions,
        completion_ids=[ids.tolist() for ids in call.completion_ids],
        trainer_state=call.state,
        log_extra=log.log_extra,
        log_metric=log.log_metric,
    )
    scores, errors = checked(returned, len(call))
    invalid = {str(position): error for position, error in errors.items()}
    return Reply("scores", scores=scores, invalid=invalid, metrics=log.metrics, extras=log.extras)


def checked(returned: Any, count: int) -> tuple[Scores, dict[int, str]]:
    """Return `count` scores, None where the returned value is invalid, and an error message by position.

    Valid are finite numbers and None. If the number of values is wrong, all positions are invalid.
    """
    try:
        given = list(returned)
    except TypeError:
        complaint = f"returned {type(returned).__name__}, expected a list of {count} numbers or None"
        return [None] * count, dict.fromkeys(range(count), complaint)
    if len(given) != count:
        return [None] * count, dict.fromkeys(range(count), f"returned {len(given)} scores for {count} completions")
    scores: Scores = []
    errors: dict[int, str] = {}
    for position, item in enumerate(given):
        try:
            value = None if item is None or isinstance(item, str) else float(item)
        except (TypeError, ValueError):
            value = None
        if item is not None and (value is None or not math.isfinite(value)):
            errors[position] = f"returned {item!r:.80}, expected a finite number or None"
            value = None
        scores.append(value)
    return scores, errors


class FunctionLog:
    """Collects what a function logs through TRL's two callbacks about the `count` completions of a call."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Loggable]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Sequence[object]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(values)} values for {self.count} completions")
        self.extras[str(column)] = [value if isinstance(value, Loggable) else str(value) for value in values]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
