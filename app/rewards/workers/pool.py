"""A pool of reward workers that can be killed at any time."""

from __future__ import annotations

import logging
import pickle
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

from app.rewards.base import Reward
from app.rewards.workers.fork_server import ForkServer
from app.rewards.workers.task import Call, CallResult, FailureKind, Reply, Setup
from datamodules.errors import UserError

logger = logging.getLogger("dots.rewards")


@dataclass(frozen=True)
class WorkerOptions:
    """Number and limits of the processes that compute rewards.

    Args:
        num_workers: number of processes.
        time_limit_s: seconds that a worker may spend on one chunk. A chunk that takes longer is scored again one
            completion at a time, each under the same limit.
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


@dataclass(frozen=True)
class _Job:
    """A unit of work: call number `call` of a batch, or its completion `item` alone."""

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
    def busy(self) -> bool:
        return not self.ready or self.job is not None


@dataclass(frozen=True)
class _Failure:
    """A job without scores: it timed out, raised an exception or its worker died."""

    kind: FailureKind
    error: str
    traceback: str = ""


class RewardWorkers:
    """Computes rewards in separate processes, where a hang or a crash costs only the score of one completion.

    Results depend neither on the number of workers nor on the order in which they finish. Not thread-safe.

    Args:
        rewards: rewards; they must pickle.
        options: number of processes and their limits.
    """

    MAX_FAILED_STARTS = 3
    """Number of workers in a row that may die while loading."""

    def __init__(self, rewards: Sequence[Reward], options: WorkerOptions) -> None:
        self.options = options
        self._rewards = list(rewards)
        self._server: ForkServer | None = None
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._traceback_shown: set[int] = set()

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
        pending = deque(_Job(index, None, call) for index, call in enumerate(calls) if len(call))
        # Results by call, whole or by completion, so that their order does not depend on the order of arrival.
        whole = [None if len(call) else CallResult([]) for call in calls]
        single: list[dict[int, CallResult]] = [{} for _ in calls]
        while (
            pending
            or any(worker.job for worker in self._workers)
            or (not calls and not all(worker.ready for worker in self._workers))
        ):
            for position, worker in enumerate(self._workers):
                if pending and worker.ready and worker.job is None:
                    self._assign(position, pending)
            for position, worker in self._wait_for_events():
                outcome = self._receive(position, worker)
                if outcome is None:
                    continue
                job, result = outcome
                if isinstance(result, _Failure):
                    if len(job.request) > 1:  # retry one completion at a time
                        items = reversed(range(len(job.request)))
                        pending.extendleft(_Job(job.call, item, job.request.only(item)) for item in items)
                        continue
                    failure, reward = result, job.request.reward
                    self._warn(job.request, 0, failure.kind, failure.error)
                    if failure.traceback and reward not in self._traceback_shown:
                        self._traceback_shown.add(reward)
                        logger.error("first traceback of reward %r:\n%s", self._rewards[reward].name, failure.traceback)
                    result = CallResult([None], {0: failure.kind})
                if job.item is None:
                    whole[job.call] = result
                else:
                    single[job.call][job.item] = result
        return [
            found or CallResult.joined([parts[item] for item in sorted(parts)])
            for found, parts in zip(whole, single, strict=True)
        ]

    def _assign(self, position: int, pending: deque[_Job]) -> None:
        """Send the next job to an idle worker, or replace the worker if it has died."""
        worker, job = self._workers[position], pending[0]
        message = pickle.dumps(job.request, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            worker.connection.send_bytes(message)
        except OSError:
            self._workers[position] = self._replace(worker)
            return
        worker.job = pending.popleft()
        worker.deadline = time.monotonic() + self.options.time_limit_s

    def _wait_for_events(self) -> list[tuple[int, _Worker]]:
        """Wait until a worker sends a message or exceeds its deadline, and return all workers that have done so."""
        deadlines = [worker.deadline for worker in self._workers if worker.busy]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else 0.0
        readable = wait([worker.connection for worker in self._workers], timeout)
        now = time.monotonic()
        return [
            (position, worker)
            for position, worker in enumerate(self._workers)
            if worker.connection in readable or (worker.busy and now >= worker.deadline)
        ]

    def _receive(self, position: int, worker: _Worker) -> tuple[_Job, CallResult | _Failure] | None:
        """Handle a worker's message, timeout or death. Return its job and the outcome if that ends the job."""
        if not worker.connection.poll():
            if not worker.ready:
                raise UserError(
                    f"{self._describe(worker)} did not load within load_limit_s={self.options.load_limit_s:g} s. "
                    "Make its import faster or raise the limit."
                )
            self._workers[position] = self._replace(worker)
            assert worker.job is not None
            return worker.job, _Failure("timed_out", f"took more than {self.options.time_limit_s:g} s")
        try:
            reply = Reply.decode(worker.connection.recv_bytes())
        except (EOFError, OSError):
            return self._reap(position, worker)
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
        elif worker.job is not None:
            job, worker.job = worker.job, None
            if reply.kind == "raised":
                return job, _Failure("crashed", reply.error, reply.traceback)
            errors = {int(item): error for item, error in reply.invalid.items()}
            for item, error in errors.items():
                self._warn(job.request, item, "crashed", error)
            failures: dict[int, FailureKind] = dict.fromkeys(errors, "crashed")
            calls = Counter(name for name, _ in reply.metrics)
            metrics = [(name, value, len(job.request) / calls[name]) for name, value in reply.metrics]
            return job, CallResult(reply.scores, failures, metrics, reply.extras)
        return None

    def _reap(self, position: int, worker: _Worker) -> tuple[_Job, _Failure] | None:
        """Replace a worker that has died, and return the job that dies with it."""
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= self.MAX_FAILED_STARTS:
                raise UserError(
                    f"{self._describe(worker)}: {self._failed_starts} workers in a row died while loading it. "
                    f"Raise memory_limit_mb={self.options.memory_limit_mb}, or check what its import does."
                )
        self._workers[position] = self._replace(worker)
        return (worker.job, _Failure("crashed", "its worker died")) if worker.job else None

    def _describe(self, worker: _Worker) -> str:
        return "The reward worker" if worker.loading is None else f"Reward {self._rewards[worker.loading].name!r}"

    def _warn(self, call: Call, item: int, kind: FailureKind, error: str) -> None:
        name = self._rewards[call.reward].name
        logger.warning("reward %r %s on %s: %s", name, kind.replace("_", " "), call.labels[item], error)

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
                connection.send(Setup(tuple(pickled), self.options.memory_limit_mb))
                return _Worker(connection, time.monotonic() + self.options.load_limit_s)
            except OSError:  # the server died, and all workers with it
                self._server.close()
                self._server = None
        raise RuntimeError("Reward workers cannot be started: their server ends at once. See its output above.")

    def _replace(self, worker: _Worker) -> _Worker:
        if self._server is not None and worker.pid is not None:
            self._server.kill(worker.pid)
        worker.connection.close()
        return self._spawn()
