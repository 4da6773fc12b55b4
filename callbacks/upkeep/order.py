"""The order in which callbacks must stand, checked before anything is generated."""

from __future__ import annotations

from itertools import pairwise

from lightning.pytorch import Callback, Trainer

from datamodules.errors import UserError

# A push comes before the rollouts that need it; reference groups are offered before prompts are rolled out; replayed
# groups complete what the rollouts left open; the next step's prompts are chosen when this step has all its groups;
# whatever reports stands behind whatever does.
_ORDER = (
    "WeightSync",
    "ReferenceRollouts",
    "Rollouts",
    "DynamicSampling",
    "RolloutReplay",
    "RolloutAhead",
    "SelectionMonitor",
    "CompletionsLog",
    "RandomState",
    "RunLedger",
    "ClockBudget",
)


def check_order(trainer: Trainer) -> None:
    """Raises UserError when two of our callbacks stand in the wrong order, or `Rollouts` is missing or doubled."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
    names = [name for callback in callbacks if (name := _known_name(callback))]
    if names.count("Rollouts") != 1:
        raise UserError(
            f"trainer.callbacks holds callbacks.Rollouts {names.count('Rollouts')} times: list it exactly once"
        )
    for first, second in pairwise(names):
        if _ORDER.index(first) > _ORDER.index(second):
            raise UserError(f"trainer.callbacks lists {first} before {second}: put {second} before {first}")


def _known_name(callback: Callback) -> str | None:
    return next((kind.__name__ for kind in type(callback).__mro__ if kind.__name__ in _ORDER), None)
