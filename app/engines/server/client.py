"""What the trainer asks of one vLLM server over HTTP."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

import aiohttp

from app.engines.requests import Answer, EngineError
from datamodules.errors import UserError

# Below the five seconds after which vLLM closes an idle connection, so that no request meets one that is closing.
_KEEP_ALIVE = 2.0
_PROBE = aiohttp.ClientTimeout(total=10.0)
_BETWEEN_PROBES = 1.0
_FAILED_PROBES = 3
"""In a row: a busy server may be late once."""

# Whatever a server's generation defaults say: nothing but the sampling of the config changes the distribution.
_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "return_token_ids": True,
}


class ServerGone(Exception):  # noqa: N818  # a condition that the engine handles, not an error of the user's
    """The server does not answer, or answers that it cannot go on."""


class _Failed(ServerGone):
    """It answers that something went wrong inside it."""


class _NotFinite(Exception):  # noqa: N818  # turned into an answer
    """It has an answer with NaN in it, for which JSON has no word."""


class ServerClient:
    """One server. Its coroutines belong to one event loop.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        key: sent with every request; "" for none.
        key_variable: where it came from, for messages.
        concurrency: requests on their way at a time; the others wait here.
        timeout: seconds that an answer may take.
    """

    def __init__(self, url: str, key: str, key_variable: str, concurrency: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.key_variable = key_variable
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._concurrency = concurrency
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._probes: aiohttp.ClientSession | None = None

    async def healthy(self) -> bool:
        """Whether the server and its engine are up."""
        try:
            async with self._probe_session().get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def until_lost(self) -> None:
        """Returns when the server is no longer healthy."""
        failures = 0
        while failures < _FAILED_PROBES:
            await asyncio.sleep(_BETWEEN_PROBES)
            failures = 0 if await self.healthy() else failures + 1

    async def max_model_len(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        models = await self._request("GET", "/v1/models")
        return int(models["data"][0]["max_model_len"])

    async def world_size(self) -> int:
        """Workers behind the server."""
        return int((await self._request("GET", "/get_world_size"))["world_size"])

    async def complete(self, fields: Mapping[str, Any]) -> Answer:
        """One sample: a prompt of token ids, and how it is drawn."""
        body = {**fields, **_NEUTRAL}
        try:
            choice = (await self._request("POST", "/v1/completions", json=body))["choices"][0]
        except _NotFinite:
            return Answer([0], [math.nan], "length")
        logprobs = [math.nan if one is None else one for one in choice["logprobs"]["token_logprobs"]]
        return Answer(choice["token_ids"], logprobs, choice["finish_reason"])

    async def call(self, method: str, **arguments: object) -> list[str]:
        """Calls a method of the worker extension; what each worker returned, as text.

        Raises EngineError when it failed and the server goes on.
        """
        body = {"method": method, "kwargs": {name: str(value) for name, value in arguments.items()}}
        try:
            results = (await self._request("POST", "/collective_rpc", json=body))["results"]
        except _Failed as failed:
            if await self.healthy():
                raise EngineError(f"{method} failed in vLLM's worker: {failed}") from failed
            raise
        return [str(result) for result in results]

    async def pause(self) -> None:
        """Waits for what is being generated, and generates nothing until `resume`."""
        await self._request("POST", "/pause", params={"mode": "wait", "clear_cache": "true"})

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def reset_prefix_cache(self) -> bool:
        """Forgets the keys and values of the weights before; False when some are in use."""
        return bool((await self._request("POST", "/reset_prefix_cache"))["success"])

    async def close(self) -> None:
        for session in (self._session, self._probes):
            if session is not None:
                await session.close()
        self._session = self._probes = None

    def _probe_session(self) -> aiohttp.ClientSession:
        # Apart from the others, behind which a probe would wait for a free connection.
        if self._probes is None:
            self._probes = aiohttp.ClientSession(headers=self._headers, timeout=_PROBE)
        return self._probes

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._concurrency, keepalive_timeout=_KEEP_ALIVE)
            self._session = aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout)
        return self._session

    async def _request(self, verb: str, path: str, **options: Any) -> Any:
        try:
            async with self._open().request(verb, self.url + path, **options) as response:
                if response.status != 200:
                    self._refused(path, response.status, await response.text())
                return await response.json(content_type=None)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise ServerGone(f"{self.url}{path}: {reason}") from error

    def _refused(self, path: str, status: int, text: str) -> None:
        said = " ".join(text.split())[:300]
        if status in (401, 403):
            raise UserError(
                f"{self.url}{path}: the server refuses the key ({status}); "
                f"export {self.key_variable} with the key that the server was started with"
            )
        if status == 404:
            raise UserError(
                f"{self.url}{path}: not found (404); expected a server as `dots serve` starts it, "
                "with VLLM_SERVER_DEV_MODE=1 and the worker extension"
            )
        if "not JSON compliant" in said:
            raise _NotFinite
        if status >= 500:
            raise _Failed(f"{self.url}{path}: {status} {said}")
        raise EngineError(f"{self.url}{path}: the server refused the request ({status}): {said}")


async def together(clients: Sequence[ServerClient], work: Sequence[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Results of all the work that is asked of the servers, in order.

    A server whose engine has died may keep a request open for ever: meanwhile each is asked whether it is healthy.

    Raises ServerGone when one is not; all work is then broken off.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    watches = {asyncio.ensure_future(client.until_lost()): client for client in clients}
    done: asyncio.Future[list[Any]] = asyncio.gather(*tasks)
    awaited: list[asyncio.Future[Any]] = [done, *watches]
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        lost = [client.url for watch, client in watches.items() if watch.done()]
        raise ServerGone(f"{', '.join(lost)}: no longer healthy")
    finally:
        for each in (*tasks, *watches):
            each.cancel()
        await asyncio.gather(done, *tasks, *watches, return_exceptions=True)
