"""Rewards and the worker processes that compute them. Importing this package loads no heavy library."""

import logging

from app.rewards.base import Reward, ScoreError
from app.rewards.code.reward import Code
from app.rewards.environment import Environment
from app.rewards.formatting import Format, SoftOverlong
from app.rewards.function import Function
from app.rewards.judge import Judge
from app.rewards.math import Math
from app.rewards.named import Named, rewards_of
from app.rewards.numeric import Exact, Numeric
from app.rewards.reasoning_gym import ReasoningGym
from app.rewards.remote import Remote
from app.rewards.scorer import RewardScorer, ScoreResult
from app.rewards.workers.pool import RewardWorkers, WorkerOptions
from app.rewards.workers.task import TrainerState

__all__ = [
    "Code",
    "Environment",
    "Exact",
    "Format",
    "Function",
    "Judge",
    "Math",
    "Named",
    "Numeric",
    "ReasoningGym",
    "Remote",
    "Reward",
    "RewardScorer",
    "RewardWorkers",
    "ScoreError",
    "ScoreResult",
    "SoftOverlong",
    "TrainerState",
    "WorkerOptions",
    "rewards_of",
]


def __getattr__(name: str) -> type[ReasoningGym]:
    """Resolve the deprecated name `Procedural`, with one line of notice per process."""
    if name != "Procedural":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    logging.getLogger("dots.rewards").warning("app.rewards.Procedural is deprecated. Use app.rewards.ReasoningGym.")
    globals()[name] = ReasoningGym  # so that later look-ups no longer reach this function
    return ReasoningGym
