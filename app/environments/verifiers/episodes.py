"""Episodes of `verifiers` 0.4, turn by turn."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from aiohttp import web

from app.environments.base import Environment, Reply, ToolCall
from datamodules.errors import UserError

if TYPE_CHECKING:
    import verifiers.v1 as vf


class VerifiersEnvironment(Environment):
    """Runs an episode, and lets it wait whenever its agent asks for a turn of the policy.

    The agent asks an endpoint in this process. Its event loop runs only while a method does.

    Args:
        taskset: as in `Verifiers`.
        arguments: as in `Verifiers`.
        env: as in `Verifiers`.

    Raises:
        UserError: the configuration does not fit, or it is not clear which agent is the policy.
    """

    def __init__(self, taskset: str, arguments: Mapping[str, Any], env: Mapping[str, Any]) -> None:
        import verifiers.v1 as vf

        try:
            self._env = vf.load_environment(_config(taskset, arguments, env))
        except Exception as error:
            said = " ".join(str(error).split())
            raise UserError(
                f"verifiers does not accept the configuration of model.environment for {taskset!r}: {said}"
            ) from error
        self._agent = _policy_of(self._env.config)
        self._asked: asyncio.Queue[_Turn] = asyncio.Queue()
        self._turn: _Turn | None = None
        self._messages: list[dict[str, Any]] = []
        self._tools: list[dict[str, Any]] | None = None
        self._traces: list[vf.Trace] = []
        self._episode: asyncio.Task[vf.Episode] | None = None
        self._loop = asyncio.Runner()
        self._context = self._loop.run(self._serve())

    def tools(self) -> list[dict[str, Any]]:
        self._loop.run(self._begin(next(iter(self._env.taskset))))
        assert self._tools is not None
        return self._tools

    def reset(self, columns: Mapping[str, Any]) -> str | None:
        from app.environments.verifiers import servers

        task_type = type(self._env.taskset).task_type()
        if not columns.keys() >= {"task", "begins"}:
            raise UserError(
                "The data have no columns 'task' and 'begins', from which verifiers makes a task. Use the source "
                "datamodules.verifiers.VerifiersTasks."
            )
        data = task_type.data_type().model_validate_json(columns["task"])
        servers.conversation_seed = random.getrandbits(63)
        self._loop.run(self._begin(task_type(data, self._env.config.taskset.task)))
        expected, said = [_plain(one) for one in json.loads(columns["begins"])], self._messages
        *before, prompt = expected
        if said[: len(before)] == before and len(said) == len(expected) and said[-1]["role"] == prompt["role"]:
            text, start = said[-1]["content"], prompt["content"]
            if text.startswith(start):
                return text.removeprefix(start) or None
        raise ValueError(
            f"the agent's first request is {said}, which does not begin with the prompt {expected}. Set speaks_first "
            "of the source VerifiersTasks if the environment keeps the prompt to itself, or choose another harness"
        )

    def respond(self, text: str, calls: list[ToolCall]) -> Reply:
        known = len(self._messages)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call-{known}-{position}",
                    "type": "function",
                    "function": {"name": call.name, "arguments": json.dumps(dict(call.arguments))},
                }
                for position, call in enumerate(calls)
            ]
        failed = self._failed_calls()
        self._loop.run(self._answer(message))
        failed = self._failed_calls() - failed
        return Reply(self._messages[known + 1 :], self._turn is None, len(calls), failed)

    def reward(self) -> float | None:
        self._loop.run(self._end())
        return float(self._traces[-1].reward)

    def final(self) -> object:
        """Return the rewards and metrics of the agent by name, without their weights."""
        trace = self._traces[-1]
        return {name: reward.score for name, reward in trace.rewards.items() if reward} | trace.metrics

    async def _serve(self) -> vf.ModelContext:
        """Start the endpoint, and what `verifiers` keeps for all episodes. They live as long as the process."""
        import verifiers.v1 as vf

        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self._complete)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._serving = self._env.serving()
        await self._serving.__aenter__()
        host, port = runner.addresses[0][:2]
        client = vf.EvalClientConfig(base_url=f"http://{host}:{port}/v1", api_key_var="DOTS_NEEDS_NO_KEY")
        return vf.ModelContext(model="policy", client=client)

    async def _complete(self, request: web.Request) -> web.Response:
        """Answer a request in OpenAI's format with the policy's next turn."""
        turn = _Turn(await request.json())
        self._asked.put_nowait(turn)
        message = await turn.answer
        if message is None:
            return web.json_response({"error": {"message": "the conversation is over"}}, status=400)
        reason = "tool_calls" if "tool_calls" in message else "stop"
        completion = {"id": "turn", "created": 0, "model": "policy"}
        if not turn.request.get("stream"):
            choice = {"index": 0, "message": message, "finish_reason": reason}
            return web.json_response({**completion, "object": "chat.completion", "choices": [choice]})
        calls = [{**call, "index": index} for index, call in enumerate(message.get("tool_calls", ()))]
        choice = {"index": 0, "delta": {**message, **({"tool_calls": calls} if calls else {})}, "finish_reason": reason}
        chunk = json.dumps({**completion, "object": "chat.completion.chunk", "choices": [choice]})
        return web.Response(text=f"data: {chunk}\n\ndata: [DONE]\n\n", content_type="text/event-stream")

    async def _begin(self, task: vf.Task) -> None:
        """Start an episode, and wait for its agent's first request."""
        if self._episode is not None and not self._episode.done():  # of a conversation that was abandoned
            self._episode.cancel()
            await asyncio.wait([self._episode])
        self._asked, self._turn = asyncio.Queue(), None
        self._messages, self._traces = [], []

        def watch(trace: vf.Trace) -> None:
            if trace.agent.name in ("", self._agent):
                self._traces.append(trace)

        self._episode = asyncio.create_task(self._env.run_episode(task, self._context, on_trace=watch))
        await self._advance()
        if self._turn is None:
            raise ValueError("the episode ended before it asked the policy")

    async def _answer(self, message: dict[str, Any]) -> None:
        """Let the agent go on with the policy's turn, up to its next request or the end of the episode."""
        assert self._turn is not None, "a conversation that is over gets no answer"
        self._messages.append(_plain(message))
        self._turn.answer.set_result(message)
        await self._advance()

    async def _advance(self) -> None:
        """Wait for the next request, and read it; or for the end of the episode."""
        self._turn = await self._next()
        if self._turn is None:
            return self._check_end()
        messages = [_plain(one) for one in self._turn.request["messages"]]
        if len(self._traces) > 1 or messages[: len(self._messages)] != self._messages:
            raise NotImplementedError(
                "the agent does not continue the conversation that it has begun, but begins another one or changes "
                "what was said, which cannot be trained on"
            )
        tools = self._turn.request.get("tools") or []
        if self._tools is not None and tools != self._tools:
            raise NotImplementedError("a task offers other tools than another one, but all prompts show the same")
        self._messages, self._tools = messages, tools

    async def _next(self) -> _Turn | None:
        """Return the next turn that the policy is asked for; None at the end of the episode."""
        assert self._episode is not None
        asked = asyncio.ensure_future(self._asked.get())
        await asyncio.wait([asked, self._episode], return_when=asyncio.FIRST_COMPLETED)
        if asked.done():
            return asked.result()
        asked.cancel()
        return None

    async def _end(self) -> None:
        """End the episode where it is, as a limit of turns does, which scores it."""
        while self._turn is not None:
            self._traces[-1].stop("ended_by_dots")  # what is refused from here on is no failure
            self._turn.answer.set_result(None)
            self._turn = await self._next()
        self._check_end()

    def _check_end(self) -> None:
        """Raise what went wrong in an episode that is over."""
        assert self._episode is not None
        episode = self._episode.result()
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if not episode.ok:
            raise RuntimeError(f"{errors[-1].type}: {errors[-1].message}" if errors else "the episode failed")

    def _failed_calls(self) -> int:
        from app.environments.verifiers.harness import FAILED_CALLS

        return sum(trace.info.get(FAILED_CALLS, 0) for trace in self._traces)


class _Turn:
    """A turn that the policy is asked for: the request's body, and its answer, None for a refusal."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.request = request
        self.answer: asyncio.Future[dict[str, Any] | None] = asyncio.get_running_loop().create_future()


def _config(taskset: str, arguments: Mapping[str, Any], env: Mapping[str, Any]) -> vf.EnvConfig:
    """Return the configuration of an environment whose agents have our program where none is given."""
    import verifiers.v1 as vf

    from app.environments.verifiers.harness import HARNESS

    config = vf.resolve_env_config({"interception": {"type": "server"}, **env, "taskset": {**arguments, "id": taskset}})
    if vf.default_harness_id(taskset) != "bash":  # the taskset has a program of its own
        return config
    ours = {"harness": vf.harness_config_type(HARNESS)(id=HARNESS), "runtime": vf.SubprocessConfig()}
    agents = {name: agent for name, agent in config if isinstance(agent, vf.AgentConfig) and agent.harness is None}
    return config.model_copy(
        update={
            name: agent.model_copy(update={key: one for key, one in ours.items() if key not in agent.model_fields_set})
            for name, agent in agents.items()
        }
    )


def _policy_of(config: vf.EnvConfig) -> str:
    """Return the name of the one agent that has no model of its own."""
    import verifiers.v1 as vf

    agents = {name: agent for name, agent in config if isinstance(agent, vf.AgentConfig)}
    free = [name for name, agent in agents.items() if agent.client is None]
    if len(free) != 1:
        raise UserError(
            f"The verifiers environment has the agents {', '.join(agents)}, of which {', '.join(free) or 'none'} would "
            "be the policy, but exactly one has to be. Give every other one a client in model.environment.env, e.g. "
            f"{{{next(iter(agents))}: {{model: ..., client: {{type: eval, base_url: ..., api_key_var: ...}}}}}}."
        )
    return free[0]


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as role, text, and name of the tool."""
    content = message.get("content") or ""
    if isinstance(content, list):
        if any(part["type"] != "text" for part in content):
            raise NotImplementedError("a message holds parts other than text, which is all that is supported")
        content = "\n".join(part["text"] for part in content)
    name = {"name": message["name"]} if message["role"] == "tool" and message.get("name") else {}
    return {"role": message["role"], **name, "content": content}
