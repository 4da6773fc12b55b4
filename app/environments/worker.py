"""A process of an environment: `python -m app.environments.worker FD PARENT MODULE...` is the server that forks them.

A process serves one conversation at a time. It builds its environment at the first one and resets it for every other.
"""

from __future__ import annotations

import os
import pickle
import random
import resource
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace

import cloudpickle
import numpy as np

from app.environments.base import Environment, Reply
from app.environments.messages import (
    MAX_ANSWER_BYTES,
    MAX_OUTPUT_BYTES,
    MAX_PICKLE_BYTES,
    Answer,
    Describe,
    Open,
    Request,
    Respond,
    Setup,
)
from app.environments.options import EnvironmentOptions
from app.rewards.workers import frames
from app.rewards.workers.main import main
from app.rewards.workers.results import checked
from app.rewards.workers.serving import error_line
from datamodules.errors import UserError


def serve(connection: socket.socket) -> None:
    """Load the environment's code, then answer requests until the other end closes."""
    me = os.getpid()

    def tell(number: int, encoded: bytes) -> None:
        if os.getpid() != me:  # a fork that a tool has let return here
            os._exit(0)
        frames.send(connection, number, encoded)

    tell(frames.SETUP, Answer("started", pid=me).encode())
    setup: Setup = pickle.loads(frames.receive(connection)[1])  # noqa: S301 (from the trainer, over a private socket)
    try:
        setup.options.load()
    except BaseException as error:  # noqa: BLE001 (users' code may raise anything)
        return tell(frames.SETUP, Answer("unloadable", error=_told(error)).encode())
    tell(frames.SETUP, Answer("ready").encode())
    process = _Process(setup.options)
    while True:
        number, body = frames.receive(connection)
        answers = process.answers(pickle.loads(body))  # noqa: S301 (as above)
        while (encoded := _next(answers, setup.options)) is not None:
            tell(number, encoded)


def _next(answers: Iterator[Answer], options: EnvironmentOptions) -> bytes | None:
    """Return the next answer, or why there is none; None after the last."""
    try:
        answer = next(answers, None)
        encoded = None if answer is None else answer.encode()
    except MemoryError:
        return Answer("failed", error=f"it took more than memory_limit_mb={options.memory_limit_mb}").encode()
    except BaseException as error:  # noqa: BLE001 (users' code may raise anything)
        return Answer("failed", error=_told(error)).encode()
    if encoded is not None and len(encoded) > MAX_ANSWER_BYTES:
        said = f"it said {len(encoded) >> 20} MiB at once, more than the {MAX_ANSWER_BYTES >> 20} MiB allowed"
        return Answer("failed", error=said).encode()
    return encoded


def _told(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else error_line(error)


class _Process:
    """What a process holds: the environments that it has built, and the one of the conversation."""

    def __init__(self, options: EnvironmentOptions) -> None:
        self._options = options
        self._built: dict[str, Environment] = {}
        self._current: Environment | None = None
        self._limited = False

    def answers(self, request: Request) -> Iterator[Answer]:
        """Yield the messages that answer a request, the last of which says the result."""
        if isinstance(request, Describe):
            for name in self._options.names:
                yield from self._build(name)
            schemas = {name: built.tools() for name, built in self._built.items()}
            unscored = [name for name, built in self._built.items() if not built.scores_itself]
            yield Answer("described", schemas=schemas, unscored=unscored)
        elif isinstance(request, Open):
            self._limit_memory()
            name, columns = self._chosen(dict(request.columns))
            yield from self._build(name)
            self._current = self._built[name]
            _seed(request.seed)
            yield Answer("opened", observation=self._current.reset(columns))
        elif isinstance(request, Respond):
            yield Answer("replied", reply=self._reply(request))
        else:
            assert self._current is not None, "the trainer opens a conversation first"
            scores, errors = checked([self._current.reward()], 1)
            if errors:
                raise ValueError(f"its reward function {errors[0]}")
            yield Answer("finished", reward=scores[0], pickled=_pickled(self._current.final()))

    def _build(self, name: str) -> Iterator[Answer]:
        if name not in self._built:
            yield Answer("building")
            _seed(0)  # the same object in every process
            self._built[name] = self._options.make(name)
            yield Answer("built")

    def _limit_memory(self) -> None:
        """Limit the address space to what is in use now and the process's own share."""
        if not self._limited:
            self._limited = True
            limit = self._options.memory_limit_mb * 2**20 + _address_space()
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def _chosen(self, columns: dict[str, object]) -> tuple[str, dict[str, object]]:
        """Return the name of the environment that a row chooses, and the row without that."""
        names = self._options.names
        if names == ("",):
            return "", columns
        chosen = columns.pop("environment", None)
        if not isinstance(chosen, str) or chosen not in names:
            known = ", ".join(map(repr, names))
            raise UserError(f"the row's column 'environment' is {chosen!r}, but the environments are {known}")
        return chosen, columns

    def _reply(self, request: Respond) -> Reply:
        """Return the environment's answer to a turn, after the errors of the calls that could not be read."""
        assert self._current is not None, "the trainer opens a conversation first"
        errors = [{"role": "tool", "name": "unknown", "content": str({"error": error})} for error in request.malformed]
        reply = Reply([]) if errors and not request.calls else self._current.respond(request.text, request.calls)
        return replace(
            reply,
            messages=[{**message, "content": self._cut(message["content"])} for message in [*errors, *reply.messages]],
            calls=reply.calls + len(errors),
            failed_calls=reply.failed_calls + len(errors),
        )

    def _cut(self, content: str) -> str:
        most = self._options.max_reply_characters
        return content if len(content) <= most else f"{content[:most]} [cut: {most} of {len(content)} characters]"


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _address_space() -> int:
    """Return the address space that this process has, in bytes; 0 where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0


def _pickled(final: object) -> bytes | None:
    """Return an object as reward workers can restore it; None for None, or if it does not pickle or is too large."""
    if final is None:
        return None
    try:
        pickled: bytes = cloudpickle.dumps(final)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001 (users' classes may raise anything)
        return None
    return pickled if len(pickled) <= MAX_PICKLE_BYTES else None


if __name__ == "__main__":
    main(sys.argv[1:], serve, MAX_OUTPUT_BYTES)
