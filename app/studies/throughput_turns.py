"""Two trainers in a process each, one step of the one after one of the other, and the clock of each.

In one process they would have two teams of OpenMP threads between them, of which each makes the other's small
operations slower.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from datamodules.errors import UserError


@dataclass(frozen=True, slots=True)
class Step:
    """What one step cost.

    Attributes:
        seconds: of the whole step, wall clock.
        rollout: seconds of generation.
        reward: seconds of scoring.
        update: seconds of log-probabilities, loss, gradients and optimizer.
        completion_tokens: generated.
        peak_mib: highest resident memory of the trainer's process over that at the step's start.
    """

    seconds: float
    rollout: float
    reward: float
    update: float
    completion_tokens: int
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a trainer ended before its time: for the user, or with a traceback of its own on stderr."""

    message: str
    of_user: bool


Message = Step | Failure | Literal["ready", "done"]


class Clock:
    """The trainer's end of the pipe: it starts when its turn comes, and says what the step cost when it stops."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def start(self) -> None:
        self.pipe.send("ready")
        self.pipe.recv()
        self._resident = _reset_peak()
        self._started = time.perf_counter()

    def stop(self, *, rollout: float, reward: float, update: float | None, completion_tokens: int) -> None:
        """Notes the step; without a measured update that is what is left of its time."""
        seconds = time.perf_counter() - self._started
        left = seconds - rollout - reward if update is None else update
        peak = _status("VmHWM") - self._resident
        self.pipe.send(Step(seconds, rollout, reward, left, completion_tokens, peak))


class Side:
    """A trainer in a process of its own, from the parent's end of the pipe.

    Args:
        name: of the trainer.
        run: called there with a `Clock` behind `arguments`; importable by name.
        arguments: that can be pickled.
    """

    def __init__(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_trainer, args=(theirs, run, arguments), name=name, daemon=False)
        self._process.start()
        theirs.close()

    def set_up(self) -> None:
        """Returns when it is about to begin its first step. Raises as `step`."""
        self._expect("ready")

    def step(self) -> Step:
        """Has it do one step, and returns when it is about to begin the next one, or has ended.

        Raises:
            UserError: it cannot go on, and the user can do something about it.
            RuntimeError: it failed or was killed.
        """
        self._pipe.send("go")
        step = self._next()
        if not isinstance(step, Step):
            raise RuntimeError(f"{self.name}: {step!r} where the cost of a step was due")
        self._expect("ready", "done")
        return step

    def end(self) -> None:
        """Ends the process, wherever it is."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _expect(self, *wanted: str) -> None:
        message = self._next()
        if message not in wanted:
            raise RuntimeError(f"{self.name}: {message!r} where {' or '.join(wanted)} was due")

    def _next(self) -> Message:
        try:
            message: Message = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with code {self._process.exitcode}") from None
        if isinstance(message, Failure):
            raise (UserError if message.of_user else RuntimeError)(message.message)
        return message


def _trainer(pipe: Connection, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        run(*arguments, Clock(pipe))
        last: Message = "done"
    except UserError as error:
        last = Failure(str(error), of_user=True)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent has ended, or is about to
        return
    except BaseException as error:  # noqa: BLE001  # the parent raises it
        traceback.print_exc()
        last = Failure(f"{type(error).__name__}: {error}", of_user=False)
    pipe.send(last)


def _reset_peak() -> float:
    """Resident memory in MiB, from which on the highest is counted anew (Linux; proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024
