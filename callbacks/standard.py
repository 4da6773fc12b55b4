"""The callbacks that every run has, supplied by `DotsTrainer` unless the user lists them with options of their own."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from callbacks.algorithm.rollouts import Rollouts
from callbacks.algorithm.weight_sync import WeightSync
from callbacks.stages import StepCallback, in_order
from callbacks.upkeep.checkpoint import RunCheckpoint, check_places
from callbacks.upkeep.checks import RunChecks
from callbacks.upkeep.failed_step import FailedStep
from callbacks.upkeep.graceful_stop import GracefulStop
from callbacks.upkeep.random_state import RandomState
from callbacks.upkeep.run_folder import RunFolder
from callbacks.watching.completions import CompletionsLog
from callbacks.watching.progress import RunProgress
from callbacks.watching.results import Results
from callbacks.watching.run_ledger import RunLedger
from callbacks.watching.run_report import RunReport
from callbacks.watching.run_table import RunTable
from callbacks.watching.selection_monitor import SelectionMonitor
from callbacks.watching.validation import EndValidation, StartValidation
from datamodules.errors import UserError

STANDARD: tuple[type[StepCallback], ...] = (
    RunChecks,
    FailedStep,
    RunFolder,
    WeightSync,
    GracefulStop,
    Rollouts,
    RunTable,
    SelectionMonitor,
    CompletionsLog,
    RandomState,
    RunLedger,
    RunReport,
    Results,
    StartValidation,
    EndValidation,
    RunProgress,
    RunCheckpoint,
)


def with_standard(
    callbacks: Iterable[Callback], *, checkpoints: bool = True, progress_bar: bool = True
) -> list[Callback]:
    """Add the standard callbacks that are not listed, and sort all by their stage in a step.

    Args:
        callbacks: the listed ones; a subclass of a standard callback replaces it.
        checkpoints: whether `RunCheckpoint` is added.
        progress_bar: whether `RunProgress` is added.

    Raises:
        UserError: one of Dots' callbacks is listed twice, or two checkpoint callbacks have one folder.
    """
    listed = list(callbacks)
    kinds = [type(one) for one in listed if isinstance(one, StepCallback)]
    for kind in kinds:
        # Each RunCheckpoint has a folder of its own.
        if sum(issubclass(other, kind) for other in kinds) > 1 and not issubclass(kind, RunCheckpoint):
            raise UserError(f"trainer.callbacks lists callbacks.{kind.__name__} more than once. List it once.")
    check_places([one for one in listed if isinstance(one, RunCheckpoint)])
    left_out = {RunCheckpoint: not checkpoints, RunProgress: not progress_bar}
    missing = [
        kind() for kind in STANDARD if not left_out.get(kind) and not any(isinstance(one, kind) for one in listed)
    ]
    return in_order([*listed, *missing])
