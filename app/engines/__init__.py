"""Engines: what generates rollouts."""

from app.engines.base import RolloutEngine, Sampling
from app.engines.transformers import Transformers
from app.engines.vllm import Vllm
from app.engines.vllm_server import VllmServer

__all__ = ["RolloutEngine", "Sampling", "Transformers", "Vllm", "VllmServer"]
