"""Environments of the package `verifiers`, as configurations name them."""

from __future__ import annotations

from typing import Any

from app.environments.base import Environment
from app.environments.options import EnvironmentOptions
from datamodules.errors import UserError, require


class Verifiers(EnvironmentOptions):
    """An environment of `verifiers`, whose one agent without a model of its own is the policy.

    All of it runs as its author wrote it: set-up, tool servers, stops, simulated users, rewards. The policy's program
    is a chat loop with the task's tools, like the harness `null`, unless the taskset or `env` has another one. Prompts
    come from `datamodules.verifiers.VerifiersTasks` with the same taskset. The reward is the sum of the policy's, by
    their weights; a conversation that Dots ends at one of its limits is scored as it is then. All tasks have to offer
    the same tools, and agents to go on with the one conversation that they begin.

    Args:
        taskset: name of the package or module that exports the taskset, e.g. `gsm8k_v1`.
        arguments: the taskset's configuration.
        env: the rest of the configuration that `verifiers` calls `[env]`: `id` of another environment, its agents,
            e.g. `{agent: {harness: {id: bash}, runtime: {type: docker}}}`. Agents that are not the policy need a
            `client`.
        time_limit_s: seconds that a reset, an answer to a turn, or a reward may take, with tools and judges.

    Raises:
        UserError: `verifiers` is not installed.
    """

    def __init__(
        self,
        taskset: str,
        arguments: dict[str, Any] | None = None,
        env: dict[str, Any] | None = None,
        time_limit_s: float = 60.0,
        **limits: Any,
    ) -> None:
        super().__init__(time_limit_s=time_limit_s, **limits)
        require("verifiers")
        self.taskset, self.arguments, self.env = taskset, arguments or {}, env or {}

    @property
    def preload(self) -> tuple[str, ...]:
        # As `verifiers` finds modules by names of its hub, `owner/some-name@version`.
        module = self.taskset.rpartition("/")[2].partition("@")[0].replace("-", "_").lower()
        return "app.environments.verifiers.harness", module

    def load(self) -> None:
        import verifiers.v1 as vf

        try:
            vf.taskset_config_type(self.taskset)
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(f"The verifiers taskset {self.taskset!r} cannot be imported ({said}).") from error

    def make(self, name: str) -> Environment:
        from app.environments.verifiers.episodes import VerifiersEnvironment

        return VerifiersEnvironment(self.taskset, self.arguments, self.env)
