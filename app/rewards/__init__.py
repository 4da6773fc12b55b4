"""Rewards and the worker processes that compute them. Importing this package loads no heavy library."""

from app.rewards.base import Reward
from app.rewards.formatting import Format
from app.rewards.function import Function
from app.rewards.math import Math
from app.rewards.numeric import Exact, Numeric
from app.rewards.overlong import SoftOverlong
from app.rewards.procedural import Procedural
from app.rewards.scorer import RewardScorer, ScoreResult
from app.rewards.task import TrainerState
from app.rewards.workers import RewardWorkers, WorkerOptions

__all__ = [
    "Exact",
    "Format",
    "Function",
    "Math",
    "Numeric",
    "Procedural",
    "Reward",
    "RewardScorer",
    "RewardWorkers",
    "ScoreResult",
    "SoftOverlong",
    "TrainerState",
    "WorkerOptions",
]
