"""Engines: what generates rollouts."""

from app.engines.base import RolloutEngine, Sampling
from app.engines.transformers import Transformers

__all__ = ["RolloutEngine", "Sampling", "Transformers"]
