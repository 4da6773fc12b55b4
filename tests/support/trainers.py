"""What a hook reads of the trainer, without a run: for callbacks that are called by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

MODULE: Any = SimpleNamespace()
"""Of hooks that do not look at it."""


def trainer_with(**given: Any) -> Any:
    """Return a trainer in the middle of its third of eight steps, which validates after every fourth, with changes."""
    usual = {
        "global_step": 3, "max_steps": 8, "min_steps": None, "current_epoch": 0, "max_epochs": -1,
        "should_stop": False, "is_last_batch": False, "enable_validation": True, "num_val_batches": [2],
        "val_check_batch": 4, "is_global_zero": True, "world_size": 1, "received_sigterm": False,
        "callbacks": [], "callback_metrics": {},
        "state": SimpleNamespace(fn="fit"),
        "_signal_connector": SimpleNamespace(received_sigterm=False),
        "strategy": SimpleNamespace(launcher=None, checkpoint_io=None),
    }  # fmt: skip
    return SimpleNamespace(**(usual | given))
