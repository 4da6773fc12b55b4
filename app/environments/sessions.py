"""The processes of an environment, one per live conversation, as the trainer's side sees them."""

from __future__ import annotations

import contextlib
import pickle
import selectors
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from app.environments.base import Reply, ToolCall
from app.environments.messages import MAX_ANSWER_BYTES, Answer, Describe, Finish, Open, Request, Respond, Setup
from app.environments.options import EnvironmentOptions
from app.rewards.workers import frames
from app.rewards.workers.fork_server import ForkServer
from datamodules.errors import UserError
from datamodules.types import Outcome

_MAX_FAILED_STARTS = 3


@dataclass(frozen=True, slots=True)
class Event:
    """How a request about a conversation went.

    Attributes:
        key: the conversation.
        kind: "opened", "replied" and "finished" answer the request of that name; "failed" answers any, and ends the
            conversation.
        observation: what is added to the prompt, with "opened"; None for nothing.
        reply: with "replied".
        outcome: with "finished" and "failed".
        error: one line, with "failed".
    """

    key: int
    kind: Literal["opened", "replied", "finished", "failed"]
    observation: str | None = None
    reply: Reply | None = None
    outcome: Outcome | None = None
    error: str = ""


@dataclass(eq=False)
class _Process:
    """A process.

    Attributes:
        deadline: when it must have answered, if something was `asked`.
        limit: the limit that the deadline stands for.
        pid: known once it has started.
        key: its conversation; None if it is free.
        request: waits until the process is ready.
        number: that of the last request.
        asked: what the last request is answered by, until it is answered; "" otherwise.
        lost: why it ended while nobody waited for it.
        calls: tool calls of the conversation so far.
        failed_calls: as in `Outcome`.
        called: tool calls of the last request.
    """

    connection: socket.socket
    reader: frames.FrameReader
    deadline: float
    limit: str = ""
    pid: int | None = None
    ready: bool = False
    key: int | None = None
    request: Request | None = None
    number: int = frames.SETUP
    asked: str = ""
    lost: str = ""
    calls: int = 0
    failed_calls: int = 0
    called: int = 0


class Sessions:
    """Runs conversations with an environment in processes that are killed when they hang.

    Every `open`, `respond` and `finish` is answered by one event, and none of them waits. What is said in a
    conversation depends neither on the other ones nor on which process serves it, if the environment keeps nothing from
    one conversation to the next. Not thread-safe.

    Args:
        options: the environment.
    """

    def __init__(self, options: EnvironmentOptions) -> None:
        self.options = options
        self._server: ForkServer | None = None
        self._selector = selectors.DefaultSelector()
        self._processes: set[_Process] = set()
        self._free: list[_Process] = []
        self._conversations: dict[int, _Process] = {}
        self._queue: dict[int, Open] = {}
        self._events: list[Event] = []
        self._description: Answer | None = None
        self._failed_starts = 0
        self._numbers = count(frames.SETUP + 1)

    def start(self) -> None:
        """Start importing the environment's code, without waiting for it."""
        if self._server is None:
            self._server = ForkServer(self.options.preload, "app.environments.worker")

    def close(self) -> None:
        """Kill the processes and forget all conversations. May be called twice; a later `open` starts new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for process in [*self._processes]:
            self._discard(process)
        self._conversations.clear()
        self._queue.clear()
        self._events.clear()

    def describe(self) -> dict[str, list[dict[str, Any]]]:
        """Return the JSON schemas of the tools by name of the environment, "" for a single one.

        Raises:
            UserError: the environment's code cannot be imported in time, or is not what it should be.
        """
        return self._described().schemas

    def unscored(self) -> frozenset[str]:
        """Return the names of the environments that have no reward of their own. Raises UserError as `describe`."""
        return frozenset(self._described().unscored)

    def _described(self) -> Answer:
        if self._description is None:
            process = self._spawn()
            try:
                self._ask(process, "described", Describe())
                while self._description is None:
                    self._wait(None)
            finally:  # a process without the memory of what describing it takes serves conversations
                self._discard(process)
        return self._description

    def open(self, key: int, columns: Mapping[str, Any], seed: int) -> None:
        """Begin a conversation, as soon as a process is free.

        Args:
            key: names it until it has finished or failed, or is abandoned.
            columns: the row of the data: `prompt` and all other columns.
            seed: seed of Python's and NumPy's global generators in the process.
        """
        assert key not in self._conversations, "a key names one conversation at a time"
        assert key not in self._queue, "a key names one conversation at a time"
        self._queue[key] = Open(dict(columns), seed)
        self._serve_queue()

    def respond(self, key: int, text: str, calls: Sequence[ToolCall], malformed: Sequence[str] = ()) -> None:
        """Ask for the environment's answer to a turn of the policy.

        Args:
            key: an open conversation.
            text: what the policy said, without the markup of its calls.
            calls: the tool calls in it.
            malformed: what is wrong with each further call, which cannot be read. The policy is told, and each counts
                as a failed call; with no other call, the environment is not asked.
        """
        process = self._conversations[key]
        self._ask(process, "replied", Respond(text, list(calls), list(malformed)), len(calls) + len(malformed))

    def finish(self, key: int) -> None:
        """Ask for the reward and the final object, and end the conversation."""
        self._ask(self._conversations[key], "finished", Finish())

    def abandon(self, key: int) -> None:
        """End a conversation without an outcome, and without an event."""
        self._queue.pop(key, None)
        self._events = [event for event in self._events if event.key != key]
        process = self._conversations.pop(key, None)
        if process is None:
            return
        process.key = None
        if process.lost:
            self._discard(process)
        elif not process.asked:
            self._free.append(process)
        self._serve_queue()

    def events(self, timeout: float | None) -> list[Event]:
        """Wait for events, and return all that are there.

        Args:
            timeout: seconds to wait at most; None for as long as it takes.

        Returns:
            The events, in the order in which they came; none after the timeout, or if nothing is outstanding that a
            process is working on.

        Raises:
            UserError: the environment's code cannot be imported in time, or is not what it should be.
        """
        give_up = None if timeout is None else time.monotonic() + timeout
        while not self._events and any(
            process.asked and (process.key is not None or self._queue) for process in self._processes
        ):
            left = None if give_up is None else give_up - time.monotonic()
            self._wait(None if left is None else max(0.0, left))
            if left is not None and left <= 0:
                break
        found, self._events = self._events, []
        return found

    def _serve_queue(self) -> None:
        """Give free processes, or new ones, to conversations that wait."""
        while self._queue and (self._free or len(self._processes) < self.options.max_sessions):
            process = self._free.pop() if self._free else self._spawn()
            self._receive(process)
            if process not in self._processes:  # it has ended while it was free
                continue
            key = next(iter(self._queue))
            process.key, process.calls, process.failed_calls = key, 0, 0
            self._conversations[key] = process
            self._ask(process, "opened", self._queue.pop(key))

    def _ask(self, process: _Process, answer: str, request: Request, called: int = 0) -> None:
        """Send a request, at once or when the process is ready."""
        assert not process.asked, "a conversation has one request at a time"
        process.asked, process.request, process.called = answer, request, called
        if process.lost:
            self._fail(process, process.lost)
        elif process.ready:
            self._send(process)

    def _send(self, process: _Process) -> None:
        request, process.request, process.number = process.request, None, next(self._numbers)
        try:
            message = pickle.dumps(request, protocol=pickle.HIGHEST_PROTOCOL)
            frames.send(process.connection, process.number, message, self.options.time_limit_s)
        except OSError:
            self._fail(process, "its process ended")
        self._set_deadline(process, building=False)

    def _set_deadline(self, process: _Process, building: bool) -> None:
        name = "load_limit_s" if building or process.asked == "described" else "time_limit_s"
        seconds: float = getattr(self.options, name)
        process.deadline, process.limit = time.monotonic() + seconds, f"{name}={seconds:g}"

    def _wait(self, timeout: float | None) -> None:
        """Handle what processes send, or that one is late, waiting for it at most `timeout` seconds."""
        try:
            self._handle_all(timeout)
        except BaseException:
            self.close()
            raise

    def _handle_all(self, timeout: float | None) -> None:
        now = time.monotonic()
        waits = [process.deadline - now for process in self._processes if process.asked]
        waits += [] if timeout is None else [timeout]
        for key, _ in self._selector.select(max(0.0, min(waits, default=0.0))):
            self._receive(key.data)
        now = time.monotonic()
        for process in [one for one in self._processes if one.asked and now >= one.deadline]:
            self._receive(process)  # what it has sent in the meantime counts
            if process in self._processes and process.asked and now >= process.deadline:
                self._late(process)

    def _late(self, process: _Process) -> None:
        if not process.ready or process.asked == "described":
            raise UserError(
                f"{self._named} was not imported and built within load_limit_s={self.options.load_limit_s:g} s. Make "
                "that faster, or raise model.environment.load_limit_s."
            )
        self._fail(process, f"it took more than {process.limit}")

    def _receive(self, process: _Process) -> None:
        """Handle a process's messages, or its end."""
        if process not in self._processes or process.lost:
            return  # it was discarded since it sent them
        try:
            for number, body in process.reader.read():
                # Any other is a late reply of a process that a tool has left behind.
                if number in (frames.SETUP, process.number):
                    self._handle(process, Answer.decode(body))
                    if process not in self._processes:
                        return
        except EOFError:
            self._lose(process, "its process ended")
        except frames.GarbledError:
            self._lose(process, "something else wrote to its process's socket")

    def _handle(self, process: _Process, answer: Answer) -> None:
        if answer.kind == "started":
            process.pid = answer.pid
        elif answer.kind == "ready":
            process.ready, self._failed_starts = True, 0
            if process.request is not None:
                self._send(process)
        elif answer.kind == "unloadable" and not process.ready:
            raise UserError(f"{self._named} cannot be imported: {answer.error}")
        elif not process.asked:
            raise frames.GarbledError
        elif answer.kind in ("building", "built"):
            self._set_deadline(process, building=answer.kind == "building")
        elif answer.kind == "failed":
            self._fail(process, answer.error)
        elif answer.kind != process.asked or (answer.kind == "replied" and answer.reply is None):
            raise frames.GarbledError
        else:
            process.asked = ""
            self._handle_result(process, answer)

    def _handle_result(self, process: _Process, answer: Answer) -> None:
        key = process.key
        if answer.kind == "described":
            self._description = answer
        elif key is None:  # abandoned
            self._free.append(process)
            self._serve_queue()
        elif answer.kind == "opened":
            self._events.append(Event(key, "opened", observation=answer.observation))
        elif answer.reply is not None:
            process.calls += answer.reply.calls
            process.failed_calls += answer.reply.failed_calls
            self._events.append(Event(key, "replied", reply=answer.reply))
        else:
            outcome = Outcome(answer.reward, answer.pickled, "", process.calls, process.failed_calls)
            self._events.append(Event(key, "finished", outcome=outcome))
            del self._conversations[key]
            process.key = None
            self._free.append(process)
            self._serve_queue()

    def _lose(self, process: _Process, error: str) -> None:
        """Handle a process that has ended, or has to."""
        if not process.ready:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS or process.asked == "described":
                raise UserError(f"{self._named} cannot be imported: {error}. Check what its import does.")
        if process.asked:
            self._fail(process, error)
        elif process.key is None:
            self._discard(process)
        else:
            process.lost = error  # the next request about its conversation is told
            self._disconnect(process)

    def _fail(self, process: _Process, error: str) -> None:
        """Say that a request has failed, and kill its process."""
        if process.asked == "described":
            raise UserError(f"{self._named} cannot be used: {error}")
        if process.key is not None:
            del self._conversations[process.key]
            calls, failed = process.calls + process.called, process.failed_calls + min(1, process.called)
            outcome = Outcome(error=error, calls=calls, failed_calls=failed)
            self._events.append(Event(process.key, "failed", outcome=outcome, error=error))
        self._discard(process)
        self._serve_queue()

    @property
    def _named(self) -> str:
        return f"model.environment ({', '.join(self.options.preload) or type(self.options).__name__})"

    def _spawn(self) -> _Process:
        for _ in range(_MAX_FAILED_STARTS):
            self.start()
            assert self._server is not None
            try:
                connection = self._server.fork()
                frames.send(connection, frames.SETUP, pickle.dumps(Setup(self.options)), self.options.load_limit_s)
            except OSError:  # the server died, and all processes with it
                self._server.close()
                self._server = None
                continue
            reader = frames.FrameReader(connection, MAX_ANSWER_BYTES)
            process = _Process(connection, reader, time.monotonic() + self.options.load_limit_s)
            self._processes.add(process)
            self._selector.register(connection, selectors.EVENT_READ, process)
            return process
        raise UserError(f"{self._named} cannot be imported: its process ended. Check what its import does.")

    def _discard(self, process: _Process) -> None:
        """Kill a process and all that it has started."""
        if self._server is not None and process.pid is not None:
            self._server.kill(process.pid)
        self._disconnect(process)
        self._processes.discard(process)
        if process in self._free:
            self._free.remove(process)

    def _disconnect(self, process: _Process) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it was disconnected when it ended
            self._selector.unregister(process.connection)
        process.connection.close()
