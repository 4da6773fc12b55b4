"""Callbacks around a step. Those that a config lists are the algorithm; the trainer supplies the standard ones."""

from callbacks.algorithm.dynamic_sampling import Balanced, DynamicSampling
from callbacks.algorithm.group_sizes import GroupSizes
from callbacks.algorithm.pilots import Pilots
from callbacks.algorithm.references import ReferenceRollouts
from callbacks.algorithm.replay import RolloutReplay
from callbacks.algorithm.rollout_ahead import RolloutAhead
from callbacks.algorithm.rollouts import Rollouts
from callbacks.algorithm.weight_sync import WeightSync
from callbacks.upkeep.checkpoint import RunCheckpoint
from callbacks.upkeep.checks import RunChecks
from callbacks.upkeep.clock_budget import ClockBudget
from callbacks.upkeep.graceful_stop import GracefulStop
from callbacks.upkeep.random_state import RandomState
from callbacks.upkeep.run_folder import RunFolder
from callbacks.upkeep.sharded_policy import ShardedPolicy
from callbacks.watching.completions import CompletionsLog
from callbacks.watching.generation_cost import GenerationCost
from callbacks.watching.progress import RunProgress
from callbacks.watching.results import Results
from callbacks.watching.run_ledger import RunLedger
from callbacks.watching.run_report import RunReport
from callbacks.watching.run_table import RunTable
from callbacks.watching.selection_monitor import SelectionMonitor
from callbacks.watching.validation import EndValidation, StartValidation

__all__ = [
    "Balanced",
    "ClockBudget",
    "CompletionsLog",
    "DynamicSampling",
    "EndValidation",
    "GenerationCost",
    "GracefulStop",
    "GroupSizes",
    "Pilots",
    "RandomState",
    "ReferenceRollouts",
    "Results",
    "RolloutAhead",
    "RolloutReplay",
    "Rollouts",
    "RunCheckpoint",
    "RunChecks",
    "RunFolder",
    "RunLedger",
    "RunProgress",
    "RunReport",
    "RunTable",
    "SelectionMonitor",
    "ShardedPolicy",
    "StartValidation",
    "WeightSync",
]
