"""Rollout engines."""

from app.engines.base import RolloutEngine, Sampling
from app.engines.server.engine import VllmServer
from app.engines.transformers.engine import Transformers
from app.engines.vllm.engine import Vllm

__all__ = ["RolloutEngine", "Sampling", "Transformers", "Vllm", "VllmServer"]
