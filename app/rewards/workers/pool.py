"""A pool of reward workers that can be killed at any time."""

from __future__ import annotations

import logging
import pickle
import socket
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from multiprocessing.connection import wait

from app.rewards.base import Reward
from app.rewards.workers import frames
from app.rewards.workers.fork_server import ForkServer
from app.rewards.workers.task import MAX_REPLY_BYTES, Call, CallResult, Failure, Reply, Setup
from datamodules.errors import UserError

logger = logging.getLogger("dots.rewards")


@dataclass(frozen=True)
class WorkerOptions:
    """Number and limits of the processes that compute rewards.

    Args:
        num_workers: number of processes.
        time_limit_s: seconds that a worker may take to the next score: that of one completion, for the built-in rewards
            and a function that yields its scores, else all scores of a chunk. A chunk that takes longer is scored again
            one completion at a time, each under the same limit, until a few in a row have passed it.
        memory_limit_mb: address space of one worker, in MiB (`RLIMIT_AS`).
        load_limit_s: seconds that a worker may spend on importing what its rewards need.
        chunk_size: completions sent to a worker at once. Groups are kept together, so a larger group makes a larger
            chunk.
    """

    num_workers: int = 2
    time_limit_s: float = 10.0
    memory_limit_mb: int = 4096
    load_limit_s: float = 60.0
    chunk_size: int = 32

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise UserError(f"workers.{name} is {value}, but must be above 0. Raise it or leave it out.")


@dataclass
class _Job:
    """A unit of work: the completions of call number `call` from `first` on, whole or one by one.

    Attributes:
        parts: results by first completion of the call; shared by all its jobs.
        first: position of the first completion in the call.
        request: the call for these completions.
        late: completions in a row before the first that have passed the time limit one by one.
        overran: completions of the job whose time limit this one repeats.
        answered: number of completions, from the first on, that have a score.
        partial: what a generator has yielded so far, from the first on.
    """

    parts: dict[int, CallResult]
    first: int
    request: Call
    late: int = 0
    overran: int = 0
    answered: int = 0
    partial: CallResult = field(default_factory=lambda: CallResult([]))

    def store(self, result: CallResult) -> None:
        """Store the result of the next completions."""
        result.overran, self.overran = self.overran, 0
        self.parts[self.first + self.answered] = result
        self.answered += len(result.scores)


@dataclass
class _Worker:
    connection: socket.socket
    reader: frames.FrameReader
    deadline: float
    pid: int | None = None
    loading: int | None = None
    ready: bool = False
    job: _Job | None = None
    number: int = 0

    @property
    def busy(self) -> bool:
        return not self.ready or self.job is not None


class RewardWorkers:
    """Computes rewards in separate processes, where a hang or a crash costs only the score of one completion.

    Results depend neither on the number of workers nor on the order in which they finish. Not thread-safe.

    Args:
        rewards: rewards; they must pickle.
        options: number of processes and their limits.
    """

    MAX_FAILED_STARTS = 3
    """Number of workers in a row that may die while loading."""
    MAX_LATE = 4
    """Completions in a row that may pass the time limit one by one, after their call as a whole has passed it, before
    the others of the call are given up, and so is every other call of that reward that passes it in the same `run`."""

    def __init__(self, rewards: Sequence[Reward], options: WorkerOptions) -> None:
        self.options = options
        self._rewards = list(rewards)
        self._server: ForkServer | None = None
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._given_up: set[int] = set()
        self._told: set[str] = set()
        self._numbers = count(frames.SETUP + 1)

    def start(self) -> None:
        """Start the processes without waiting for them, unless they are running."""
        while len(self._workers) < self.options.num_workers:
            self._workers.append(self._spawn())

    def run(self, calls: Sequence[Call]) -> list[CallResult]:
        """Run calls, in order, on workers as they become free, and return one result per call.

        Without calls, wait until every worker has loaded all rewards.

        Raises:
            UserError: a reward cannot be loaded (in time), or rejects its configuration or the data's columns.
        """
        try:
            self.start()
            return self._run(calls)
        except BaseException:
            self.close()  # a worker may still be computing a result that nobody will read
            raise

    def close(self) -> None:
        """Kill the processes. May be called twice; a later `run` starts new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for worker in self._workers:
            worker.connection.close()
        self._workers = []

    def _run(self, calls: Sequence[Call]) -> list[CallResult]:
        self._given_up.clear()
        # Results by first completion, so that their order does not depend on the order of arrival.
        parts: list[dict[int, CallResult]] = [{} for _ in calls]
        pending = deque(
            _Job(found, 0, replace(call, one_by_one=self._rewards[call.reward].one_by_one and not call.trial))
            for call, found in zip(calls, parts, strict=True)
            if len(call)
        )
        while (
            pending
            or any(worker.job for worker in self._workers)
            or (not calls and not all(worker.ready for worker in self._workers))
        ):
            for position, worker in enumerate(self._workers):
                if pending and worker.ready and worker.job is None:
                    self._assign(position, pending)
            for position, worker in self._wait_for_events():
                if failure := self._receive(position, worker):
                    assert worker.job is not None
                    if (rest := self._after_failure(worker.job, failure)) is not None:
                        pending.appendleft(rest)
                    worker.job = None
        return [CallResult.joined([found[first] for first in sorted(found)]) for found in parts]

    def _after_failure(self, job: _Job, failure: Failure) -> _Job | None:
        """Store what a failed job has to say, and return the job for the completions that are to be scored again."""
        if job.partial.scores:
            job.store(job.partial)
        request, done, late = job.request, job.answered, failure.kind == "timed_out"
        left = len(request) - done
        given_up = request.trial or (late and request.reward in self._given_up)
        if not request.one_by_one and not given_up and left > 1:
            rest = replace(request.rows(done, len(request)), one_by_one=True)
            return _Job(job.parts, job.first + done, rest, overran=left if late else 0)
        late_in_row = (0 if done else job.late) + 1 if late else 0
        if late_in_row == self.MAX_LATE and not self._rewards[request.reward].one_by_one:
            self._given_up.add(request.reward)
            given_up = True
        lost = left if given_up else min(1, left)
        job.store(CallResult([None] * lost, dict.fromkeys(range(lost), failure)))
        if lost == left:
            return None
        rest = replace(request.rows(done + 1, len(request)), one_by_one=True)
        return _Job(job.parts, job.first + done + 1, rest, late=late_in_row)

    def _assign(self, position: int, pending: deque[_Job]) -> None:
        """Send the next job to an idle worker, or replace the worker if it has died."""
        worker, job = self._workers[position], pending[0]
        message = pickle.dumps(job.request, protocol=pickle.HIGHEST_PROTOCOL)
        worker.number = next(self._numbers)
        try:
            frames.send(worker.connection, worker.number, message, self.options.load_limit_s)
        except OSError:
            self._workers[position] = self._replace(worker)
            return
        worker.job = pending.popleft()
        worker.deadline = time.monotonic() + self.options.time_limit_s

    def _wait_for_events(self) -> list[tuple[int, _Worker]]:
        """Wait until a worker sends something or exceeds its deadline, and return all workers that have done so."""
        deadlines = [worker.deadline for worker in self._workers if worker.busy]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
        readable = wait([worker.connection for worker in self._workers], timeout)
        now = time.monotonic()
        return [
            (position, worker)
            for position, worker in enumerate(self._workers)
            if worker.connection in readable or (worker.busy and now >= worker.deadline)
        ]

    def _receive(self, position: int, worker: _Worker) -> Failure | None:
        """Handle a worker's messages, timeout or death. Return the failure of its job, if it has failed."""
        try:
            for number, body in worker.reader.read():
                # Any other is a late reply of a process that a reward has left behind.
                if number == worker.number and (failure := self._handle(worker, Reply.decode(body))):
                    return failure
        except EOFError:
            return self._reap(position, worker, Failure("crashed", "its worker process ended"))
        except frames.GarbledError:
            return self._reap(position, worker, Failure("crashed", "something else wrote to its worker's socket"))
        if not worker.busy or time.monotonic() < worker.deadline:
            return None
        if not worker.ready:
            raise UserError(
                f"{self._describe(worker)} did not load within "
                f"model.reward_workers.load_limit_s={self.options.load_limit_s:g} s. Make its import faster or raise "
                "the limit."
            )
        late = f"took more than model.reward_workers.time_limit_s={self.options.time_limit_s:g} s"
        return self._reap(position, worker, Failure("timed_out", late))

    def _handle(self, worker: _Worker, reply: Reply) -> Failure | None:
        """Handle a message. Return the failure of the worker's job, if that is what it says."""
        if reply.kind == "unusable":
            raise UserError(reply.error)
        if reply.kind == "unloadable":
            logger.error(reply.traceback)
            raise UserError(f"{self._describe(worker)} cannot be loaded in a worker ({reply.error}). Fix its code.")
        if reply.kind == "started":
            worker.pid = reply.pid
        elif reply.kind == "loading":
            worker.loading = reply.reward
        elif reply.kind == "ready":
            worker.ready, self._failed_starts = True, 0
            for note in reply.notes:
                if note not in self._told:
                    self._told.add(note)
                    logger.warning(note)
        elif (job := worker.job) is not None:
            raised = Failure("crashed", reply.error, reply.traceback) if reply.kind == "raised" else None
            if raised and not job.request.one_by_one:
                return raised
            worker.deadline = time.monotonic() + self.options.time_limit_s
            if reply.kind == "partial":
                if job.request.one_by_one:
                    return None
                if reply.row != len(job.partial.scores) or len(reply.scores) != 1 or reply.row >= len(job.request):
                    raise frames.GarbledError
                job.partial.scores += reply.scores
                if reply.failures:
                    job.partial.failures[reply.row] = reply.failures[0]
                return None
            expected = 1 if job.request.one_by_one else len(job.request)
            if reply.row != job.answered or not (raised or len(reply.scores) == expected):
                raise frames.GarbledError
            metrics = [(name, value, float(expected)) for name, value in reply.metrics]
            job.store(
                CallResult([None], {0: raised})
                if raised
                else CallResult(reply.scores, reply.failures, metrics, reply.extras, reply.notes)
            )
            if job.answered == len(job.request):
                worker.job = None
        return None

    def _reap(self, position: int, worker: _Worker, failure: Failure) -> Failure | None:
        """Replace a worker that has died or has to. Return the failure if it had a job."""
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= self.MAX_FAILED_STARTS:
                raise UserError(
                    f"{self._describe(worker)}: {self._failed_starts} workers in a row died while loading it. Raise "
                    f"model.reward_workers.memory_limit_mb={self.options.memory_limit_mb}, or check what its import "
                    "does."
                )
        self._workers[position] = self._replace(worker)
        return failure if worker.job else None

    def _describe(self, worker: _Worker) -> str:
        return "The reward worker" if worker.loading is None else f"Reward {self._rewards[worker.loading].name!r}"

    def _spawn(self) -> _Worker:
        pickled = []
        for reward in self._rewards:
            try:
                pickled.append(pickle.dumps(reward))
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                message = f"Reward {reward.name!r} does not pickle ({error}). Store only plain values in it."
                raise UserError(message) from error
        for _ in range(self.MAX_FAILED_STARTS):
            if self._server is None:
                self._server = ForkServer(sorted({module for reward in self._rewards for module in reward.preload}))
            try:
                connection = self._server.fork()
                setup = pickle.dumps(Setup(tuple(pickled), self.options.memory_limit_mb, self.options.num_workers))
                frames.send(connection, frames.SETUP, setup, self.options.load_limit_s)
                reader = frames.FrameReader(connection, MAX_REPLY_BYTES)
                return _Worker(connection, reader, time.monotonic() + self.options.load_limit_s)
            except OSError:  # the server died, and all workers with it
                self._server.close()
                self._server = None
        raise RuntimeError("Reward workers cannot be started: their server ends at once. See its output above.")

    def _replace(self, worker: _Worker) -> _Worker:
        if self._server is not None and worker.pid is not None:
            self._server.kill(worker.pid)
        worker.connection.close()
        return self._spawn()
