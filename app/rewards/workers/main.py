"""The reward processes: `python -m app.rewards.workers.main FD PARENT MODULE...`, started by `nursery`.

The nursery imports the slow libraries once and forks a worker for every socket it is sent, so that replacing a killed
worker takes milliseconds. It does not import users' code: a function that hangs at import, or starts CUDA or threads
there, does so in a worker. Workers lead a process group each and die with the nursery, which ends with the trainer.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
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

from app.rewards.base import Reward
from app.rewards.workers.task import ORDER, Call, Setup
from datamodules.errors import UserError

PR_SET_PDEATHSIG = 1
MAX_REPLY_BYTES = 16 * 2**20
"""Scores of a chunk take some hundred bytes; what a function logs beside them must not fill the trainer's memory."""
_SHOWN_TRACEBACK = 20_000


def main(control_fd: int, parent: int, modules: Sequence[str]) -> None:
    """Forks and kills workers as ordered, until the trainer closes its end or is gone."""
    for module in modules:
        with contextlib.suppress(ImportError):  # reported by the worker that needs it
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # shared pages stay shared in the workers
    control = socket.socket(fileno=control_fd)
    children: set[int] = set()
    while os.getppid() == parent:
        readable, _, _ = select.select([control], [], [], 1.0)
        _bury(children)
        if readable and not _obey(control, children):
            break
    for child in children:
        _kill(child)


def _obey(control: socket.socket, children: set[int]) -> bool:
    """Carries out one order; False when there will be no more."""
    data, descriptors, _, _ = socket.recv_fds(control, ORDER.size, 1)
    if not data:
        return False
    order, pid = ORDER.unpack(data)
    if order == b"K":
        if pid in children:
            _kill(pid)
        return True
    nursery = os.getpid()
    child = os.fork()
    if child == 0:
        control.close()
        _become_worker(descriptors[0], nursery)
    os.close(descriptors[0])
    children.add(child)
    return True


def _bury(children: set[int]) -> None:
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0]:
            children.remove(child)
            _kill(child)  # what it started and left behind


def _kill(child: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not lead its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)


def _become_worker(descriptor: int, nursery: int) -> None:
    """Serves one connection and exits, never returning into the nursery's loop."""
    status = 1
    try:
        os.setsid()
        _die_with_parent(nursery)
        serve(Connection(descriptor))
        status = 0
    except (EOFError, BrokenPipeError, ConnectionResetError):
        status = 0
    except BaseException:  # noqa: BLE001 (it ends the process)
        traceback.print_exc()
    finally:
        os._exit(status)


def _die_with_parent(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def serve(connection: Connection) -> None:
    """Loads the rewards, then answers calls until the other end closes."""
    reply(connection, kind="born", pid=os.getpid())
    setup: Setup = connection.recv()
    limit = setup.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
    rewards = []
    for position, pickled in enumerate(setup.rewards):
        reply(connection, kind="loading", reward=position)
        try:
            reward = pickle.loads(pickled)  # noqa: S301 (from the trainer, over a private socket)
            reward.load()
        except UserError as error:
            return reply(connection, kind="unusable", error=str(error))
        except (Exception, SystemExit):  # noqa: BLE001 (a reward may raise anything)
            return reply(connection, kind="unloadable", error=_line(), traceback=traceback.format_exc())
        rewards.append(reward)
    reply(connection, kind="ready")
    while True:
        request = connection.recv_bytes()
        try:
            call: Call = pickle.loads(request)  # noqa: S301 (from the trainer, over a private socket)
            answer = score(rewards[call.reward], call)
        except UserError as error:
            answer = {"kind": "unusable", "error": str(error)}
        except (Exception, SystemExit):  # noqa: BLE001 (a reward may raise anything)
            answer = {"kind": "raised", "error": _line(), "traceback": traceback.format_exc()[-_SHOWN_TRACEBACK:]}
        reply(connection, **answer)


def _line() -> str:
    """The exception being handled, on one line."""
    kind, error, _ = sys.exc_info()
    return " ".join("".join(traceback.format_exception_only(kind, error)).split())[:300]


def reply(connection: Connection, **message: Any) -> None:
    """Sends a message to the trainer; one that is larger than `MAX_REPLY_BYTES` becomes a failure of the reward."""
    encoded = json.dumps(message).encode()
    if len(encoded) > MAX_REPLY_BYTES:
        error = f"logged {len(encoded) >> 20} MiB beside its scores, expected less than {MAX_REPLY_BYTES >> 20}"
        encoded = json.dumps({"kind": "raised", "error": error, "traceback": error}).encode()
    connection.send_bytes(encoded)


def score(reward: Reward, call: Call) -> dict[str, Any]:
    """Runs the reward on the call's completions and checks what it returns."""
    random.seed(call.seed)
    np.random.seed(call.seed % 2**32)
    journal = Journal(len(call))
    scores = reward(
        **call.columns,
        prompts=call.prompts,
        completions=call.completions,
        completion_ids=[ids.tolist() for ids in call.completion_ids],
        trainer_state=call.state,
        log_extra=journal.log_extra,
        log_metric=journal.log_metric,
    )
    values, wrong = checked(scores, len(call))
    return {"kind": "scores", "scores": values, "wrong": wrong, "metrics": journal.metrics, "extras": journal.extras}


def checked(scores: Any, count: int) -> tuple[list[float | None], dict[int, str]]:
    """`count` floats or Nones, and what is wrong with the others by position: all, where their number is wrong."""
    try:
        given = list(scores)
    except TypeError:
        complaint = f"returned {type(scores).__name__}, expected a list of {count} numbers or None"
        return [None] * count, dict.fromkeys(range(count), complaint)
    if len(given) != count:
        return [None] * count, dict.fromkeys(range(count), f"returned {len(given)} scores for {count} completions")
    values: list[float | None] = []
    wrong: dict[int, str] = {}
    for position, item in enumerate(given):
        try:
            value = None if item is None or isinstance(item, str) else float(item)
        except (TypeError, ValueError):
            value = None
        if item is not None and (value is None or not math.isfinite(value)):
            wrong[position] = f"returned {item!r:.80}, expected a finite number or None"
            value = None
        values.append(value)
    return values, wrong


class Journal:
    """What a function logs about the `count` completions of a call, by TRL's two callbacks."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: list[tuple[str, float]] = []
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: float) -> None:
        self.metrics.append((str(name), float(value)))

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self.count:
            raise ValueError(f"log_extra({column!r}): {len(values)} values for {self.count} completions")
        simple = (str, int, float, bool, type(None))
        self.extras[str(column)] = [value if isinstance(value, simple) else str(value) for value in values]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
