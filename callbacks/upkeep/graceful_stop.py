"""Ends a run in order: on Ctrl-C and SIGTERM after the step in progress, and with all processes when one is lost."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from app.module import GRPOModule
from app.ranks import LostRankError, Ranks
from app.runs.lightning_internals import after_signal_handlers, is_subprocess_launcher, mark_stop_received
from callbacks.stages import Stage, StepCallback
from callbacks.upkeep.checkpoint import validation_follows
from datamodules.types import TrainBatch

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class GracefulStop(StepCallback):
    """Takes Ctrl-C and SIGTERM over from Lightning while a run trains.

    Lightning lets Ctrl-C break a step in two, and on SIGTERM broadcasts inside the signal handler, in the middle of
    whatever collective the process is in. Here the handler sets a flag. The ranks agree on it at the end of a step and
    of the validation that belongs to it, before the checkpoint is due. A second Ctrl-C stops at once.
    """

    stage = Stage.AGREE_TO_STOP

    def __init__(self) -> None:
        self._received: int | None = None
        self._before: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        after_signal_handlers(trainer, self._take_over)

    def _take_over(self) -> None:
        if threading.current_thread() is threading.main_thread() and not self._before:
            for number in _SIGNALS:
                self._before[number] = signal.signal(number, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: GRPOModule, outputs: object, batch: TrainBatch, batch_idx: int
    ) -> None:
        if not validation_follows(trainer, batch_idx):
            self.agree(trainer, pl_module.ranks)

    def on_validation_end(self, trainer: Trainer, pl_module: GRPOModule) -> None:
        if trainer.state.fn == "fit":
            self.agree(trainer, pl_module.ranks)

    def agree(self, trainer: Trainer, ranks: Ranks) -> None:
        """Share a signal that any rank has received. Collective. A run that is at its end simply ends."""
        if trainer.global_step >= trainer.max_steps > 0:
            return
        received = self._received is not None
        if ranks.any(received) if ranks.size > 1 else received:
            mark_stop_received(trainer)

    def on_exception(self, trainer: Trainer, pl_module: GRPOModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            # 128 + the signal, as shells count. Lightning's exception would end the process with 0, as if all was done.
            number = self._received or signal.SIGTERM
            exception.code = 128 + number
            if trainer.is_global_zero:
                of = f" of {trainer.max_steps}" if trainer.max_steps > 0 else ""
                print(
                    f"dots: stopped by {signal.Signals(number).name} after {trainer.global_step}{of} updates, which "
                    "are saved. Run the same command with --ckpt_path last to continue.",
                    file=sys.stderr,
                    flush=True,
                )
        launcher = trainer.strategy.launcher
        if isinstance(exception, LostRankError) and is_subprocess_launcher(launcher):
            # A process that hangs would outlive the run: Lightning ends its processes only when one of them has
            # failed. Not yet: it kills this one too, within seconds of a child's death, before the message is out.
            atexit.register(launcher.kill, signal.SIGKILL)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"dots: stopping after the step in progress (press Ctrl-C again to stop now, unsaved)\n")
        self._received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
