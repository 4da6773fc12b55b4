"""The program of the policy's seat in environments of `verifiers`: a chat loop in the environment's own process.

The loops that come with `verifiers` are programs that `uv` installs and starts, one per conversation. This one says the
same to the policy and calls the same tools, without that cost.
"""

from __future__ import annotations

import json
import sys
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import connect_mcp, mcp_content_to_chat_content

import app.environments.verifiers.servers  # noqa: F401  (from here on, tool servers are forks)

__all__ = ["ChatHarness"]

HARNESS = "dots"
"""Name by which `verifiers` finds the harness."""

FAILED_CALLS = "dots_failed_calls"
"""Where a trace's `info` counts the tool calls that failed."""

# Harnesses are looked up among the modules of this package, and then among those of the top level.
sys.modules[f"verifiers.v1.harnesses.{HARNESS}"] = sys.modules[__name__]


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Asks the policy and calls its tools until it calls none."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: vf.ModelContext,
        trace: vf.Trace,
        runtime: vf.Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: vf.TaskData,
    ) -> vf.ProgramResult:
        system, prompt = self.resolve_prompt(data)
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += map(message_to_wire, prompt or [])
        timeout = self.config.tool_timeout
        config = {"mcpServers": {name: {"url": url, "timeout": timeout} for name, url in mcp_urls.items()}}
        async with AsyncExitStack() as stack:
            tools, dispatch, servers = await connect_mcp(config, stack)
            # The policy answers when its batch is done, so no time limit.
            session = await stack.enter_async_context(aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(None)))
            while True:
                body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                headers = {"Authorization": f"Bearer {secret}"}
                async with session.post(f"{endpoint}/chat/completions", json=body, headers=headers) as response:
                    if response.status != 200:  # a stop of the task's refuses turns like this, too
                        return vf.ProgramResult(exit_code=1, stdout="", stderr=await response.text())
                    said = (await response.json())["choices"][0]["message"]
                messages.append(said)
                if not said.get("tool_calls"):
                    return vf.ProgramResult(exit_code=0, stdout="", stderr="")
                for call in said["tool_calls"]:
                    name = call["function"]["name"]
                    content, failed = await self._call(dispatch, servers, name, call["function"]["arguments"])
                    trace.info[FAILED_CALLS] = trace.info.get(FAILED_CALLS, 0) + failed
                    messages.append({"role": "tool", "tool_call_id": call["id"], "name": name, "content": content})

    async def _call(self, dispatch: dict, servers: dict, name: str, arguments: str) -> tuple[Any, bool]:
        """Return what a tool says, and whether the call failed."""
        if name not in dispatch:
            return f"error: unknown tool {name!r}", True
        server, tool = dispatch[name]
        result = await servers[server].run(lambda client: client.call_tool(tool, json.loads(arguments)))
        return mcp_content_to_chat_content(result.content), bool(result.is_error)
