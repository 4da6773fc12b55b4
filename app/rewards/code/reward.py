"""Generated Python code, run against tests."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.rewards.answers import CHECK_SECONDS, text_of
from app.rewards.base import Column, Reward, Texts, TokenIds
from app.rewards.code.cases import BESIDE, COLUMNS, Cases, read_cases, same_output
from app.rewards.code.sandbox import Isolation, Sandbox
from datamodules.errors import UserError
from datamodules.types import REWARD_ARGUMENTS

_FENCE = re.compile(r"(?ims)^[ \t]*```[ \t]*(?:python3?|py)?[ \t]*\n(.*?)^[ \t]*```")
logger = logging.getLogger("dots.rewards")


class Code(Reward):
    """1 if the Python program of a completion passes all tests of its row, else 0; None for a row without tests.

    Each program runs in processes of its own: with an empty folder and a clean environment, without network, under
    limits of time, memory, files and processes. What isolates it (Linux namespaces, bubblewrap, or filters of system
    calls and files) is said once at the start. Crashes and programs that take too long fail their tests. Tests are read
    from the columns of MBPP (`test_list`), HumanEval (`test` and `entry_point`), APPS and TACO (`input_output`),
    LiveCodeBench (`public_test_cases`), DeepCoder (`tests`) and verl (`ground_truth`).

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        tests: column with the tests, `a.b` for a nested one; by default the first of the usual ones that has any.
        score: "all" for 1 if every test is passed and else 0, "fraction" for the fraction of passed tests.
        fenced: the program is the last fenced block of Python after any thinking, and a completion without one scores
            0; else it is the whole completion.
        prelude: code that is run before every program.
        time_limit_s: seconds for all tests of a program, by the clock and of its processor. What has not passed by then
            has failed. `reward_workers.time_limit_s` must be at least 3 seconds longer.
        memory_limit_mb: address space of a program, in MiB.
        num_processes: programs that a worker runs at once; by default the machine's cores divided by all workers.
        isolation: what must isolate programs; "auto" takes the first of "namespaces", "bubblewrap", "filters" (seccomp
            and Landlock), "seccomp" and "none" that the system offers, another value is refused where it is not there.
    """

    def __init__(
        self,
        weight: float = 1.0,
        correctness: bool | None = None,
        name: str | None = None,
        tests: str | None = None,
        score: Literal["all", "fraction"] = "all",
        fenced: bool = True,
        prelude: str = "from typing import *",
        time_limit_s: float = 6.0,
        memory_limit_mb: int = 1024,
        num_processes: int | None = None,
        isolation: Isolation = "auto",
    ) -> None:
        super().__init__(weight, correctness, name)
        limits = {"time_limit_s": time_limit_s, "memory_limit_mb": memory_limit_mb, "num_processes": num_processes}
        for option, value in limits.items():
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{option} of app.rewards.Code is {value}, but must be above 0. Change it.")
        self.tests, self.score, self.fenced, self.prelude = tests, score, fenced, prelude
        self.time_limit_s, self.memory_limit_mb, self.num_processes = time_limit_s, memory_limit_mb, num_processes
        self.isolation = isolation
        self.seconds_per_score = time_limit_s + 3.0  # to start, and to give up a process that hangs
        self._last: tuple[tuple[int, ...], Cases, Mapping[str, Any]] = (), Cases(), {}

    def load(self) -> None:
        self._loop = asyncio.new_event_loop()
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._slots = asyncio.Semaphore(self.num_processes or max(1, _cores() // (self.sharing_workers * ranks)))
        self._sandbox = Sandbox(self.isolation, self.memory_limit_mb)
        self.start_notice = self._loop.run_until_complete(self._sandbox.start())

    def __call__(
        self, /, prompts: Texts, completions: Texts, completion_ids: TokenIds, **columns: Column
    ) -> Iterator[float | None]:
        data = {name: values for name, values in columns.items() if name not in REWARD_ARGUMENTS}
        paths = (self.tests,) if self.tests else COLUMNS
        if completions and not any(path.split(".")[0] in data for path in paths):
            raise UserError(
                "The data has no column with tests for app.rewards.Code, only "
                f"{', '.join(map(repr, sorted(data)))}. Set its option tests, or give the column one of the usual "
                f"names: {', '.join(COLUMNS)}."
            )
        tasks = []
        for row, completion in enumerate(completions):
            cases = self._cases({name: values[row] for name, values in data.items()})
            tasks.append(self._loop.create_task(self._judged(text_of(completion), cases)))
        verdicts: list[_Verdict | None] = []
        try:
            # At the time of a yield, all earlier programs have ended and the next one has started, since slots are
            # given in order. So no score takes longer than one program.
            for task in tasks:
                verdicts.append(verdict := self._loop.run_until_complete(task))
                if verdict is None:
                    yield None
                else:
                    yield verdict.passed if self.score == "fraction" else float(verdict.passed == 1)
        finally:
            for task in tasks:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        if callable(log_metric := columns.get("log_metric")):
            for verdict in filter(None, verdicts):
                for name, value in vars(verdict).items():
                    log_metric(name, value)
        if callable(log_extra := columns.get("log_extra")):
            log_extra("passed_tests", [None if verdict is None else verdict.passed for verdict in verdicts])

    def _cases(self, row: Mapping[str, Any]) -> Cases:
        """Return the tests of a row; none where `check_tests` has said that they cannot be read."""
        key = tuple(map(id, row.values()))  # a group shares its row
        if key != self._last[0]:
            try:
                self._last = key, read_cases(row, self.tests), row
            except ValueError:
                self._last = key, Cases(), row
        return self._last[1]

    async def _judged(self, text: str, cases: Cases) -> _Verdict | None:
        if not len(cases):
            return None
        async with self._slots:
            deadline = self._loop.time() + self.time_limit_s
            if (program := self._program(text)) is None:
                return _Verdict(passed=0.0, no_program=1.0)
            passed, timed_out = 0, False
            for given, expected in cases.runs:
                ran = await self._sandbox.run(program, deadline - self._loop.time(), stdin=given)
                right = ran.status == 0 and not ran.timed_out and same_output(ran.output, expected)
                passed += right
                timed_out |= ran.timed_out
                if ran.timed_out or (self.score == "all" and not right):
                    break
            if cases.tests and not timed_out:
                ran = await self._sandbox.run(program, deadline - self._loop.time(), tests=cases.tests)
                passed += ran.output.count("1")
                timed_out = ran.timed_out
            return _Verdict(passed / len(cases), timed_out=float(timed_out))

    def _program(self, text: str) -> tuple[str, str] | None:
        if self.fenced:
            blocks = _FENCE.findall(text.rpartition("</think>")[2])
            if not blocks:
                return None
            text = textwrap.dedent(blocks[-1])
        return self.prelude, text

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Columns of the data that tests are read from."""
        return (*((self.tests,) if self.tests else COLUMNS), *BESIDE)

    def check_tests(self, ids: Sequence[str], rows: Iterable[Mapping[str, Any]], source: str) -> None:
        """Say in one line how many rows hold tests that cannot be read, and name the first; stop after some seconds.

        Raises:
            UserError: they all do.
        """
        deadline, read, unread, first = time.monotonic() + CHECK_SECONDS, 0, 0, ""
        for name, row in zip(ids, rows, strict=True):
            read += 1
            try:
                read_cases(row, self.tests)
            except ValueError as error:
                unread += 1
                first = first or f"that of prompt {name!r}, {error}"
            if time.monotonic() > deadline:
                break
        if unread:
            found = f"The tests of {unread} of {read} rows of {source} cannot be read by {self.name}, first {first}."
            if unread == read:
                raise UserError(f"{found} Correct the data, or set the option tests of app.rewards.Code.")
            logger.warning("%s The reward does not apply to such prompts.", found)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


@dataclass(frozen=True)
class _Verdict:
    """What is logged of a completion: the fraction of passed tests, and whether it took too long or has no program."""

    passed: float
    timed_out: float = 0.0
    no_program: float = 0.0
