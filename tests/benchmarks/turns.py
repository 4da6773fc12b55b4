"""Run two trainers in a process each, a step of one after a step of the other, and time every step.

In one process they would share a machine's cores between two teams of OpenMP threads, which slow each other down.
"""

from __future__ import annotations

import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from datamodules.errors import UserError


@dataclass(frozen=True, slots=True)
class Step:
    """The cost of one step.

    Attributes:
        seconds: wall-clock time of the whole step.
        rollout: seconds of generation.
        reward: seconds of scoring.
        update: seconds of log-probabilities, loss, gradients and optimizer.
        completion_tokens: tokens generated.
        peak_mib: highest resident memory of the process over that at the step's start.
    """

    seconds: float
    rollout: float
    reward: float
    update: float
    completion_tokens: int
    peak_mib: float


class Clock:
    """The trainer's end of the pipe: `start` waits for its turn, `stop` reports the step."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe

    def start(self) -> None:
        self.pipe.send("ready")
        self.pipe.recv()
        # From here on the highest resident memory is measured (Linux; proc(5), clear_refs).
        Path("/proc/self/clear_refs").write_text("5")
        self._resident = _status("VmRSS")
        self._started = time.perf_counter()

    def stop(self, *, rollout: float, reward: float, update: float | None, completion_tokens: int) -> None:
        """Report the step; the update takes the rest of its time where that was not measured."""
        seconds = time.perf_counter() - self._started
        update = seconds - rollout - reward if update is None else update
        self.pipe.send(Step(seconds, rollout, reward, update, completion_tokens, _status("VmHWM") - self._resident))


def _status(name: str) -> float:
    """Return a line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1]) / 1024


class Side:
    """A trainer in its own process, from the parent's end of the pipe.

    Args:
        name: of the trainer.
        run: called there with `arguments` and a `Clock`; importable by name.
        arguments: picklable.
    """

    def __init__(self, name: str, run: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_train, args=(theirs, run, arguments), name=name, daemon=False)
        self._process.start()
        theirs.close()

    def set_up(self) -> None:
        """Return when it is about to begin its first step. Raise as `step`."""
        self._receive()

    def step(self) -> Step:
        """Let it do a step, and return when it is about to begin the next one or has ended.

        Raises:
            UserError: it cannot continue, and the user can do something about it.
            RuntimeError: it failed or was killed.
        """
        self._pipe.send("go")
        step = self._receive()
        assert isinstance(step, Step)
        self._receive()
        return step

    def end(self) -> None:
        """End the process, wherever it is."""
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _receive(self) -> object:
        try:
            message = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"{self.name}: its process ended with code {self._process.exitcode}") from None
        if isinstance(message, Exception):
            raise message
        return message


def _train(pipe: Connection, run: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    try:
        run(*arguments, Clock(pipe))
        pipe.send("done")
    except UserError as error:
        pipe.send(UserError(str(error)))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):  # the parent has ended, or is about to
        return
    except BaseException as error:  # noqa: BLE001  # the parent raises it
        traceback.print_exc()
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


def scripted(completions: Sequence[str], informative: Sequence[bool], **_: object) -> list[float]:
    """Return the rewards of both trainers: a hash of the completion where the prompt is informative, else 0.5."""
    return [
        zlib.crc32(text.encode()) % 997 / 997 if differs else 0.5
        for text, differs in zip(completions, informative, strict=True)
    ]
