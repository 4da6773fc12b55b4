"""A bounded pool of reward workers that can be killed."""

from __future__ import annotations

import json
import logging
import pickle
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from app.rewards.base import Reward
from app.rewards.workers.nursery import Nursery
from app.rewards.workers.task import Call, CallResult, FailureKind, Setup
from datamodules.errors import UserError

logger = logging.getLogger("dots.rewards")


@dataclass(frozen=True)
class WorkerOptions:
    """The processes that compute rewards.

    Args:
        num_workers: processes.
        time_limit_s: seconds that a worker may take over one chunk. A chunk that takes longer is scored again one
            completion at a time, under the same limit each.
        memory_limit_mb: address space of one worker, in MiB (`RLIMIT_AS`).
        load_limit_s: seconds that a worker may take to import what its rewards need.
        chunk_size: completions sent to a worker at once; groups are kept together, so a large group is a larger chunk.
    """

    num_workers: int = 2
    time_limit_s: float = 10.0
    memory_limit_mb: int = 4096
    load_limit_s: float = 60.0
    chunk_size: int = 32

    def __post_init__(self) -> None:
        for name in ("num_workers", "time_limit_s", "memory_limit_mb", "load_limit_s", "chunk_size"):
            if not getattr(self, name) > 0:
                raise UserError(f"workers.{name}={getattr(self, name)}: expected more than 0")


@dataclass(frozen=True)
class _Job:
    """A call to be run: the `call`-th of a batch, or one completion of it."""

    call: int
    item: int | None
    request: Call


@dataclass
class _Worker:
    connection: Connection
    deadline: float
    pid: int | None = None
    loading: int | None = None
    ready: bool = False
    job: _Job | None = None

    @property
    def waited_for(self) -> bool:
        return not self.ready or self.job is not None


class RewardWorkers:
    """Computes rewards in processes of their own; what hangs or dies there costs one completion's score.

    Results do not depend on the number of workers or on which finishes first. Not thread safe.

    Args:
        rewards: rewards, which need to pickle.
        options: limits.
    """

    MAX_STILLBORN = 3
    """Workers in a row that may die while loading."""

    def __init__(self, rewards: Sequence[Reward], options: WorkerOptions) -> None:
        self.options = options
        self._rewards = list(rewards)
        self._nursery: Nursery | None = None
        self._workers: list[_Worker] = []
        self._stillborn = 0
        self._traced: set[int] = set()

    def start(self) -> None:
        """Starts the processes without waiting for them. Does nothing when they run."""
        while len(self._workers) < self.options.num_workers:
            self._workers.append(self._hire())

    def wait_ready(self) -> None:
        """Starts the processes and waits until each has loaded all rewards.

        Raises:
            UserError: a reward cannot be loaded, or not within the time limit.
        """
        self.run([])

    def run(self, calls: Sequence[Call]) -> list[CallResult]:
        """Computes calls, in order of the list as workers become free.

        Raises:
            UserError: a reward cannot be loaded, or finds its configuration or the data's columns wrong.
        """
        try:
            self.start()
            return self._run(calls)
        except BaseException:
            self.close()  # a worker may be in the middle of a call whose result nobody waits for
            raise

    def close(self) -> None:
        """Kills the processes. May be called twice; a later `run` starts new ones."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        for worker in self._workers:
            worker.connection.close()
        self._workers = []

    def _run(self, calls: Sequence[Call]) -> list[CallResult]:
        pending = deque(_Job(index, None, call) for index, call in enumerate(calls) if len(call))
        board = _Board(calls)
        while pending or any(worker.job for worker in self._workers) or (not calls and self._loading):
            for position, worker in enumerate(self._workers):
                if pending and worker.ready and worker.job is None:
                    self._assign(position, pending)
            for position, worker in self._events():
                outcome = self._receive(position, worker)
                if outcome is not None:
                    self._settle(*outcome, board, pending)
        return board.results()

    @property
    def _loading(self) -> bool:
        return any(not worker.ready for worker in self._workers)

    def _assign(self, position: int, pending: deque[_Job]) -> None:
        worker, job = self._workers[position], pending[0]
        message = pickle.dumps(job.request, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            worker.connection.send_bytes(message)
        except OSError:  # it died idle
            self._workers[position] = self._replace(worker)
            return
        worker.job = pending.popleft()
        worker.deadline = time.monotonic() + self.options.time_limit_s

    def _events(self) -> list[tuple[int, _Worker]]:
        """Workers that have said something or are late, waiting for the first such event."""
        deadlines = [worker.deadline for worker in self._workers if worker.waited_for]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
        heard = wait([worker.connection for worker in self._workers], timeout)
        now = time.monotonic()
        return [
            (position, worker)
            for position, worker in enumerate(self._workers)
            if worker.connection in heard or (worker.waited_for and now >= worker.deadline)
        ]

    def _receive(self, position: int, worker: _Worker) -> tuple[_Job, dict[str, Any]] | None:
        """What came of the worker's job, if that is what happened."""
        if not worker.connection.poll():
            return self._expire(position, worker)
        try:
            message = json.loads(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return self._bury(position, worker)
        kind = message["kind"]
        if kind in ("unusable", "unloadable"):
            self._refuse(worker, message)
        elif kind == "born":
            worker.pid = message["pid"]
        elif kind == "loading":
            worker.loading = message["reward"]
        elif kind == "ready":
            worker.ready, self._stillborn = True, 0
        elif worker.job is not None:
            job, worker.job = worker.job, None
            return job, message
        return None

    def _expire(self, position: int, worker: _Worker) -> tuple[_Job, dict[str, Any]] | None:
        if not worker.ready:
            raise UserError(
                f"{self._describe(worker)} did not load within load_limit_s={self.options.load_limit_s:g} s: "
                "make its import faster, or raise the limit"
            )
        self._workers[position] = self._replace(worker)
        assert worker.job is not None
        return worker.job, {"kind": "timed_out", "error": f"took more than {self.options.time_limit_s:g} s"}

    def _bury(self, position: int, worker: _Worker) -> tuple[_Job, dict[str, Any]] | None:
        if not worker.ready:
            self._stillborn += 1
            if self._stillborn >= self.MAX_STILLBORN:
                raise UserError(
                    f"{self._describe(worker)}: {self._stillborn} workers died while loading it; "
                    f"raise memory_limit_mb={self.options.memory_limit_mb}, or see what its import does"
                )
        self._workers[position] = self._replace(worker)
        return (worker.job, {"kind": "died", "error": "its worker died"}) if worker.job else None

    def _refuse(self, worker: _Worker, message: dict[str, Any]) -> None:
        if message["kind"] == "unloadable":
            logger.error(message["traceback"])
            raise UserError(f"{self._describe(worker)} cannot be loaded in a worker ({message['error']}); mend it")
        raise UserError(message["error"])

    def _describe(self, worker: _Worker) -> str:
        if worker.loading is None:
            return "the reward worker"
        return f"reward {self._rewards[worker.loading].name!r}"

    def _settle(self, job: _Job, message: dict[str, Any], board: _Board, pending: deque[_Job]) -> None:
        """Enters a job's outcome; a failed chunk is queued again, one completion at a time."""
        if message["kind"] == "scores":
            wrong = {int(item): error for item, error in message["wrong"].items()}
            for item, error in wrong.items():
                self._warn(job.request, item, "crashed", error)
            failures: dict[int, FailureKind] = dict.fromkeys(wrong, "crashed")
            logged = Counter(name for name, _ in message["metrics"])
            metrics = [(name, value, len(job.request) / logged[name]) for name, value in message["metrics"]]
            board.enter(job, CallResult(message["scores"], failures, metrics, message["extras"]))
            return
        if len(job.request) > 1:
            pending.extendleft(
                _Job(job.call, item, job.request.only(item)) for item in reversed(range(len(job.request)))
            )
            return
        kind: FailureKind = "timed_out" if message["kind"] == "timed_out" else "crashed"
        self._warn(job.request, 0, kind, message["error"])
        if "traceback" in message and job.request.reward not in self._traced:
            self._traced.add(job.request.reward)
            logger.error(
                "first traceback of reward %r:\n%s", self._rewards[job.request.reward].name, message["traceback"]
            )
        board.enter(job, CallResult([None], {0: kind}))

    def _warn(self, call: Call, item: int, kind: FailureKind, error: str) -> None:
        name = self._rewards[call.reward].name
        logger.warning("reward %r %s on %s: %s", name, kind.replace("_", " "), call.labels[item], error)

    def _hire(self) -> _Worker:
        setup = Setup(tuple(map(_pickled, self._rewards)), self.options.memory_limit_mb)
        for _ in range(self.MAX_STILLBORN):
            if self._nursery is None:
                self._nursery = Nursery(sorted({module for reward in self._rewards for module in reward.preload}))
            try:
                connection = self._nursery.fork()
                connection.send(setup)
                return _Worker(connection, time.monotonic() + self.options.load_limit_s)
            except OSError:  # the nursery died, and all workers with it
                self._nursery.close()
                self._nursery = None
        raise RuntimeError("reward workers cannot be started: their process ends at once; see its output above")

    def _replace(self, worker: _Worker) -> _Worker:
        if self._nursery is not None and worker.pid is not None:
            self._nursery.kill(worker.pid)
        worker.connection.close()
        return self._hire()


class _Board:
    """Outcomes of a batch of calls, in the order of the calls whatever the order of arrival."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._whole: list[CallResult | None] = [None if len(call) else CallResult([]) for call in calls]
        self._single: list[list[CallResult | None]] = [[None] * len(call) for call in calls]

    def enter(self, job: _Job, result: CallResult) -> None:
        if job.item is None:
            self._whole[job.call] = result
        else:
            self._single[job.call][job.item] = result

    def results(self) -> list[CallResult]:
        singles = ([part for part in parts if part is not None] for parts in self._single)
        return [whole or CallResult.joined(parts) for whole, parts in zip(self._whole, singles, strict=True)]


def _pickled(reward: Reward) -> bytes:
    try:
        return pickle.dumps(reward)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"reward {reward.name!r} does not pickle ({error}): keep only plain values in it") from error
