"""Environments that the policy talks to in several turns, and their tools. Importing this loads no heavy library."""

from app.environments.base import Environment, Reply, ToolCall
from app.environments.openenv import OpenEnv
from app.environments.options import EnvironmentOptions, Plain
from app.environments.tools import Tools
from app.environments.verifiers.options import Verifiers

__all__ = ["Environment", "EnvironmentOptions", "OpenEnv", "Plain", "Reply", "ToolCall", "Tools", "Verifiers"]
