"""Dots: what happens around a step. The callbacks listed in a config, in their order, are the algorithm."""

from callbacks.algorithm.dynamic_sampling import Balanced, DynamicSampling
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.algorithm.rollout_ahead import RolloutAhead
from callbacks.algorithm.rollouts import Rollouts
from callbacks.algorithm.weight_sync import WeightSync
from callbacks.upkeep.checkpoint import RunCheckpoint
from callbacks.upkeep.clock_budget import ClockBudget
from callbacks.upkeep.random_state import RandomState
from callbacks.upkeep.sharded_policy import ShardedPolicy
from callbacks.watching.completions import CompletionsLog
from callbacks.watching.progress import RunProgress
from callbacks.watching.run_ledger import RunLedger
from callbacks.watching.selection_monitor import SelectionMonitor
from callbacks.watching.start_validation import StartValidation

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
