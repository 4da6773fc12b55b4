"""SIGTERM with several processes: one step ends on all of them, whichever got the signal."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Trainer

from app.ranks import Ranks


class StopSignal:
    """Takes SIGTERM over from Lightning when there are several ranks.

    Lightning broadcasts inside the signal handler, in the middle of whatever collective the process is in. Here the
    handler sets a flag, and the ranks agree on it at the end of the step, before the checkpoint is due.
    """

    def __init__(self) -> None:
        self._received = False
        self._before: Any = None

    def install(self, ranks: Ranks) -> None:
        """To be called once Lightning has installed its own handler."""
        if ranks.size > 1 and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def remove(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._before = None

    def agree(self, trainer: Trainer, ranks: Ranks) -> None:
        """Makes a signal that one rank has received known to all. Collective."""
        if ranks.size > 1 and ranks.any(self._received):
            # What Lightning's own handler would have set; it has no public way in.
            trainer._signal_connector.received_sigterm = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = True
