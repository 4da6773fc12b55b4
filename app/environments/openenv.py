"""Environments behind OpenEnv servers (https://github.com/huggingface/OpenEnv)."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from app.environments.base import Environment, Reply, ToolCall
from app.environments.options import EnvironmentOptions
from datamodules.errors import UserError, require

if TYPE_CHECKING:
    from openenv.core import SyncEnvClient
    from openenv.core.client_types import StepResult

_PATIENCE_S = 5.0
"""How long a server that says that it is full is asked again: it frees a session some time after its end."""


class OpenEnv(EnvironmentOptions):
    """An environment behind an OpenEnv server, with its actions as tools.

    The server describes itself. Its action is one tool, whose arguments are the action's fields; an environment of MCP
    tools has those. A turn without a call ends the conversation, and so does a `done` of the server. Each conversation
    is a session of the server's, so that `max_sessions` must not exceed what it allows at a time. A class that holds a
    typed client and has tools of its own, as in TRL's documentation, is an environment for `app.environments.Tools`.

    Args:
        url: address of the server, e.g. `http://localhost:8000`; null for that in the variable OPENENV_URL.
        tool: name of the tool that is the action.
        reward: "last" for the last reward that the server gave, "sum" for their sum; 0 for a conversation without a
            step.
        reset_columns: columns of the data that a reset gets as its arguments, e.g. `[seed]`.
        token_variable: variable with a token that the server asks for; empty for none.

    Raises:
        UserError: the package `openenv` is not installed, or there is no address or token.
    """

    def __init__(
        self,
        url: str | None = None,
        tool: str = "step",
        reward: Literal["last", "sum"] = "last",
        reset_columns: Sequence[str] = (),
        token_variable: str = "",
        **limits: Any,
    ) -> None:
        super().__init__(**limits)
        require("openenv")
        address = url or os.environ.get("OPENENV_URL", "")
        if not address.startswith(("http://", "https://")):
            raise UserError(
                f"model.environment.url is {address!r}, but must be an address such as http://localhost:8000. Set it, "
                "or the variable OPENENV_URL."
            )
        if token_variable and token_variable not in os.environ:
            raise UserError(
                f"model.environment.token_variable is {token_variable!r}, but there is no such variable. Set it to the "
                "token, or leave it out."
            )
        self.url, self.tool, self.kind = address.rstrip("/"), tool, reward
        self.reset_columns, self.token_variable = tuple(reset_columns), token_variable

    @property
    def preload(self) -> tuple[str, ...]:
        return ("openenv.core.generic_client",)

    def load(self) -> None:
        import openenv.core.generic_client  # noqa: F401  (an import that fails is told here)

    def make(self, name: str) -> Environment:
        return OpenEnvEnvironment(self.url, self.tool, self.kind, self.reset_columns, self.token_variable)


class OpenEnvEnvironment(Environment):
    """A session of an OpenEnv server for each conversation.

    Args:
        url: as in `OpenEnv`.
        tool: as in `OpenEnv`.
        reward: as in `OpenEnv`.
        reset_columns: as in `OpenEnv`.
        token_variable: as in `OpenEnv`.
    """

    def __init__(
        self, url: str, tool: str, reward: Literal["last", "sum"], reset_columns: Sequence[str], token_variable: str
    ) -> None:
        self._url, self._tool, self._kind, self._reset_columns = url, tool, reward, reset_columns
        self._headers = {"Authorization": f"Bearer {os.environ[token_variable]}"} if token_variable else {}
        self._session: SyncEnvClient | None = None
        self._rewards: list[float] = []
        self._done = self._stepped = False
        action = self._schema()
        # The base of all actions, and those that call tools, leave out what the tools are.
        self._by_name = action.get("title") in ("Action", "CallToolAction", "ListToolsAction")
        if self._by_name:
            listed = self._open().step({"type": "list_tools"}).observation["tools"]
            self._close()
            self._tools = [_tool(one["name"], one.get("description"), one.get("input_schema") or {}) for one in listed]
        else:
            properties = {name: one for name, one in action.get("properties", {}).items() if name != "metadata"}
            self._tools = [_tool(tool, action.get("description"), {**action, "properties": properties})]

    def tools(self) -> list[dict[str, Any]]:
        return self._tools

    def reset(self, columns: Mapping[str, Any]) -> str | None:
        self._rewards, self._done, self._stepped = [], False, False
        if missing := [name for name in self._reset_columns if name not in columns]:
            raise UserError(f"model.environment.reset_columns has {missing[0]!r}, which is no column of the data.")
        arguments = {name: columns[name] for name in self._reset_columns}
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return self._take(self._open().reset(**arguments)) or None
            except RuntimeError as error:
                if "CAPACITY_REACHED" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise UserError(
                        f"the server takes no further session ({error}). Lower model.environment.max_sessions to what "
                        "it takes, or raise its max_concurrent_envs."
                    ) from error
                time.sleep(0.05)

    def respond(self, text: str, calls: list[ToolCall]) -> Reply:
        messages, failed = [], 0
        known = {one["function"]["name"] for one in self._tools}
        for call in calls:
            arguments = dict(call.arguments)
            if self._done:
                content, fails = "The episode is over.", True
            elif call.name not in known:
                content, fails = f"Tool {call.name} not found.", True
            else:
                action = {"type": "call_tool", "tool_name": call.name, "arguments": arguments}
                content, fails = self._step(action if self._by_name else arguments)
            failed += fails
            messages.append({"role": "tool", "name": call.name, "content": content})
        return Reply(messages, self._done or not calls, len(calls), failed)

    def reward(self) -> float | None:
        self._close()
        if not self._rewards:
            return None if self._stepped else 0.0
        return self._rewards[-1] if self._kind == "last" else sum(self._rewards)

    def final(self) -> object:
        """Return the rewards of the steps."""
        return self._rewards

    def _schema(self) -> dict[str, Any]:
        """Return the JSON schema of the server's actions."""
        import requests

        try:
            response = requests.get(f"{self._url}/schema", headers=self._headers, timeout=30)
            response.raise_for_status()
            return response.json()["action"]
        except (requests.RequestException, KeyError) as error:
            raise UserError(
                f"No OpenEnv server answers at {self._url} ({error}). Start it, or correct the url."
            ) from error

    def _open(self) -> SyncEnvClient:
        from openenv.core.generic_client import GenericEnvClient

        self._close()
        self._session = GenericEnvClient(base_url=self._url, headers=self._headers, message_timeout_s=1e9).sync()
        return self._session.connect()

    def _close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    def _step(self, action: dict[str, Any]) -> tuple[str, bool]:
        """Take a step, and return what the policy reads of it, and whether the server refused it."""
        assert self._session is not None
        self._stepped = True
        try:
            result = self._session.step(action)
        except RuntimeError as error:
            # Actions that it cannot take are the policy's fault, and leave the session as it is.
            if "VALIDATION_ERROR" not in str(error) and "EXECUTION_ERROR" not in str(error):
                raise
            return str(error), True
        return self._take(result), self._by_name and bool(result.observation.get("error"))

    def _take(self, result: StepResult[dict[str, Any]]) -> str:
        """Note the reward and the end that a step has brought, and return its observation as text."""
        self._done = result.done
        if result.reward is not None:
            self._rewards.append(float(result.reward))
        shown = {name: value for name, value in result.observation.items() if name != "metadata"}
        if self._by_name and "tool_name" in shown:
            if shown["error"]:
                return str(shown["error"]["message"])
            returned = shown["result"]
            if isinstance(returned, Mapping) and "content" in returned:  # blocks of MCP
                return "\n".join(block.get("text") or json.dumps(block) for block in returned["content"])
            shown = {"result": returned}
        if not shown:
            return ""
        values = list(shown.values())
        said = values[0] if len(values) == 1 else shown
        return said if isinstance(said, str) else json.dumps(said, ensure_ascii=False)


def _tool(name: str, description: str | None, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a tool as chat templates take it."""
    kept = {key: value for key, value in parameters.items() if key in ("properties", "required", "$defs")}
    function = {"name": name, "description": (description or "").strip(), "parameters": {"type": "object", **kept}}
    return {"type": "function", "function": function}
