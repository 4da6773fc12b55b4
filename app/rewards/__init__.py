"""Rewards and the worker processes that compute them. Importing this package loads no heavy library."""

from app.rewards.base import Reward
from app.rewards.formatting import Format
from app.rewards.function import Function
from app.rewards.math import Math
from app.rewards.numeric import Exact, Numeric
from app.rewards.overlong import SoftOverlong
from app.rewards.procedural import Procedural
from app.rewards.scorer import RewardScorer, ScoreResult
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import TrainerState

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
