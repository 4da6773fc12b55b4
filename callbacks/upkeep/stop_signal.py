"""Ctrl-C and SIGTERM: the step in progress ends, on all processes, whichever got the signal; then the run stops."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.ranks import Ranks

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignal:
    """Takes both signals over from Lightning while a run trains.

    Lightning lets Ctrl-C break a step in two, and on SIGTERM broadcasts inside the signal handler, in the middle of
    whatever collective the process is in. Here the handler sets a flag; the ranks agree on it when a step, and the
    validation that belongs to it, is over, before the checkpoint is due. A second Ctrl-C breaks the step after all.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def install(self, ranks: Ranks) -> None:
        """To be called once Lightning has installed its own handler."""
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def remove(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agree(self, trainer: Trainer, ranks: Ranks) -> None:
        """Makes a signal that one rank has received known to all. Collective. A run that is at its end just ends."""
        if trainer.global_step >= trainer.max_steps > 0:
            return
        received = self._received is not None
        if ranks.any(received) if ranks.size > 1 else received:
            # What Lightning's own handler would have set; it has no public way in.
            trainer._signal_connector.received_sigterm = True

    def give_exit_code(self, stopped: SIGTERMException, trainer: Trainer) -> None:
        """128 + the signal, as shells count; Lightning's exception would end the process with 0, as if all was done."""
        number = self._received or signal.SIGTERM
        stopped.code = 128 + number
        if trainer.is_global_zero:
            print(
                f"dots: stopped by {signal.Signals(number).name} after {trainer.global_step} of {trainer.max_steps} "
                "updates, which are saved: the same command with --ckpt_path last goes on",
                file=sys.stderr,
                flush=True,
            )

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"dots: the run stops behind the step in progress (Ctrl-C again: at once, unsaved)\n")
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
