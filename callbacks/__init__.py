"""Dots: what happens around a step. The callbacks listed in a config, in their order, are the algorithm."""

from callbacks.balanced import Balanced
from callbacks.checkpoint import RunCheckpoint
from callbacks.clock_budget import ClockBudget
from callbacks.completions import CompletionsLog
from callbacks.dynamic_sampling import DynamicSampling
from callbacks.progress import RunProgress
from callbacks.random_state import RandomState
from callbacks.references import ReferenceRollouts
from callbacks.replay import RolloutReplay
from callbacks.rollout_ahead import RolloutAhead
from callbacks.rollouts import Rollouts
from callbacks.run_ledger import RunLedger
from callbacks.selection_monitor import SelectionMonitor
from callbacks.sharded_policy import ShardedPolicy
from callbacks.start_validation import StartValidation
from callbacks.weight_sync import WeightSync

__all__ = [
    "Balanced",
    "ClockBudget",
    "CompletionsLog",
    "DynamicSampling",
    "RandomState",
    "ReferenceRollouts",
    "RolloutAhead",
    "RolloutReplay",
    "Rollouts",
    "RunCheckpoint",
    "RunLedger",
    "RunProgress",
    "SelectionMonitor",
    "ShardedPolicy",
    "StartValidation",
    "WeightSync",
]
