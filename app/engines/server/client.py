"""HTTP client of one vLLM server."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp

from app.engines.requests import Answer, EngineError
from app.engines.server.endpoints import COMPLETIONS, TOKENS, Endpoint, Endpoints
from app.engines.server.process import ServerProcess
from datamodules.errors import UserError

T = TypeVar("T")

# vLLM closes an idle connection after five seconds. A shorter limit here keeps requests off closing connections.
_KEEP_ALIVE_S = 2.0
_PROBE_TIMEOUT_S = 10.0
_PROBE_INTERVAL_S = 1.0
_POLL_S = 0.25
_BODY_TIMEOUT_S = 60.0
_MAX_BODY_BYTES = 64 * 2**20
_SHOWN = 200
_FAILED_PROBES = 3
"""Consecutive failures after which a server counts as lost: a busy server may be late once."""

# Override a server's generation defaults, so that only the configured sampling shapes the distribution.
_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}


class LostServerError(Exception):
    """A server does not answer, or reports that it cannot continue. The engine handles it."""


class _FailedRequestError(LostServerError):
    """A server reports an internal error."""


class _NotFoundError(UserError):
    """A server does not have a path."""


class _NonFiniteAnswerError(Exception):
    """A server has an answer with NaN, which JSON cannot represent."""


class ServerClient:
    """A client of one server. All its coroutines must run in the same event loop.

    Args:
        url: e.g. `http://127.0.0.1:8000`.
        key: sent with every request; "" for none.
        key_variable: environment variable that the key came from, for messages.
        concurrency: maximum number of requests in flight; further ones wait here.
        timeout: seconds to wait for an answer.

    Attributes:
        endpoints: where completions are requested; set by the owner, who knows what the server `offers`.
    """

    endpoints = Endpoints(COMPLETIONS, COMPLETIONS)

    def __init__(self, url: str, key: str, key_variable: str, concurrency: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.key_variable = key_variable
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.concurrency = concurrency
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=30.0, sock_read=timeout)
        self._sessions: tuple[aiohttp.ClientSession, aiohttp.ClientSession] | None = None

    def _connect(self) -> tuple[aiohttp.ClientSession, aiohttp.ClientSession]:
        """Return the sessions for requests and for health probes, which must not wait for a free connection."""
        if self._sessions is None:
            connector = aiohttp.TCPConnector(limit=self.concurrency, keepalive_timeout=_KEEP_ALIVE_S)
            probe_timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
            self._sessions = (
                aiohttp.ClientSession(connector=connector, headers=self._headers, timeout=self._timeout),
                aiohttp.ClientSession(headers=self._headers, timeout=probe_timeout),
            )
        return self._sessions

    async def close(self) -> None:
        for session in self._sessions or ():
            await session.close()
        self._sessions = None

    async def healthy(self) -> bool:
        """Return whether the server and its engine are up."""
        _, probes = self._connect()
        try:
            async with probes.get(f"{self.url}/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def until_lost(self) -> None:
        """Return as soon as the server is no longer healthy."""
        failures = 0
        while failures < _FAILED_PROBES:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            failures = 0 if await self.healthy() else failures + 1

    async def max_model_len(self) -> int:
        """Return the maximum number of tokens of a prompt and its completion together."""
        answer = await self._request("GET", "/v1/models")
        with self._form_of("/v1/models", answer):
            return int(answer["data"][0]["max_model_len"])

    async def world_size(self) -> int:
        """Return the server's number of workers."""
        answer = await self._request("GET", "/get_world_size")
        with self._form_of("/get_world_size", answer):
            return int(answer["world_size"])

    async def offers(self, endpoint: Endpoint) -> bool:
        """Return whether the server's description of itself (OpenAPI) has the endpoint."""
        try:
            answer = await self._request("GET", "/openapi.json")
        except _NotFoundError:
            return False  # it does not describe itself (--disable-fastapi-docs)
        with self._form_of("/openapi.json", answer):
            return endpoint.path in answer["paths"]

    async def complete(self, token_ids: Sequence[int], settings: Mapping[str, object]) -> Answer:
        """Return one sample of a prompt; `settings` are those of `request_fields`."""
        endpoint = self.endpoints.with_stop if settings["stop"] else self.endpoints.without_stop
        try:
            answer = await self._request("POST", endpoint.path, json=endpoint.body(token_ids, {**settings, **_NEUTRAL}))
        except _NonFiniteAnswerError:
            return Answer([0], [math.nan], "length")
        with self._form_of(endpoint.path, answer):
            return endpoint.read(answer)

    async def call(self, method: str, **arguments: object) -> list[str]:
        """Call a method of the worker extension and return every worker's result as text.

        Raises:
            EngineError: the method failed but the server is still healthy.
        """
        body = {"method": method, "kwargs": {name: str(value) for name, value in arguments.items()}}
        try:
            answer = await self._request("POST", "/collective_rpc", json=body)
        except _FailedRequestError as failed:
            if await self.healthy():
                raise EngineError(f"{method} failed in vLLM's worker: {failed}. See the server's log.") from failed
            raise
        with self._form_of("/collective_rpc", answer):
            return [str(result) for result in answer["results"]]

    async def pause(self) -> None:
        """Wait for running requests, and start no further ones until `resume`."""
        await self._request("POST", "/pause", params={"mode": "wait", "clear_cache": "true"})

    async def resume(self) -> None:
        await self._request("POST", "/resume")

    async def reset_prefix_cache(self) -> bool:
        """Drop the keys and values of earlier weights. Return False if some are still in use."""
        answer = await self._request("POST", "/reset_prefix_cache")
        with self._form_of("/reset_prefix_cache", answer):
            return bool(answer["success"])

    async def _request(self, verb: str, path: str, **options: Any) -> Any:
        """Send a request and return the decoded JSON of the answer, None for an empty one."""
        requests, _ = self._connect()
        try:
            # A redirect would take the prompts, and for some hosts the key, to another server.
            async with requests.request(verb, self.url + path, allow_redirects=False, **options) as response:
                status, body = response.status, await self._body(path, response)
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            reason = str(error) or type(error).__name__
            raise LostServerError(f"{self.url}{path}: {reason}") from error
        text = body.decode(errors="replace")
        if status != 200:
            self._raise_for_status(path, status, text)
        with self._form_of(path, text):
            return json.loads(text) if text.strip() else None

    async def _body(self, path: str, response: aiohttp.ClientResponse) -> bytes:
        """Read an answer that has begun, within limits of time and size: vLLM sends it whole."""
        body = bytearray()
        async with asyncio.timeout(_BODY_TIMEOUT_S):
            async for chunk in response.content.iter_chunked(2**16):
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    raise EngineError(
                        f"{self.url}{path}: the answer has more than {_MAX_BODY_BYTES} bytes. Is this a vLLM server?"
                    )
        return bytes(body)

    @contextmanager
    def _form_of(self, path: str, answer: object) -> Iterator[None]:
        """Raise an EngineError that shows the answer when its form is not that of a vLLM server's."""
        try:
            yield
        except (KeyError, IndexError, TypeError, ValueError, OverflowError, RecursionError) as error:
            shown = " ".join(str(answer)[:1000].split())[:_SHOWN] or "nothing"
            raise EngineError(
                f"{self.url}{path}: the answer is not that of a vLLM server ({type(error).__name__}: "
                f"{str(error)[:_SHOWN]}): {shown}. Check engine.url, or start a server with `dots serve`."
            ) from error

    def _raise_for_status(self, path: str, status: int, text: str) -> None:
        said = " ".join(text.split())[:300]
        if path == TOKENS.path and status in (403, 404):
            # Another server than the one that was asked at the start answers there now.
            raise LostServerError(f"{self.url} no longer offers {path} ({status})")
        if status in (401, 403):
            raise UserError(
                f"{self.url}{path}: the server refuses the key ({status}). "
                f"Set {self.key_variable} to the key that the server was started with."
            )
        if status == 404:
            raise _NotFoundError(
                f"{self.url}{path}: not found (404), but expected a server with VLLM_SERVER_DEV_MODE=1 and the worker "
                "extension. Start it with `dots serve`."
            )
        if 300 <= status < 400:
            raise EngineError(
                f"{self.url}{path}: the server redirects elsewhere ({status}). Set engine.url to the server itself."
            )
        if "not JSON compliant" in said:
            raise _NonFiniteAnswerError
        if status >= 500:
            raise _FailedRequestError(f"{self.url}{path}: {status} {said}")
        raise EngineError(f"{self.url}{path}: the server rejected the request ({status}): {said}")


async def until_healthy(
    clients: Sequence[ServerClient], processes: Sequence[ServerProcess], limit: float, advice: str
) -> None:
    """Wait at most `limit` seconds until all servers are healthy; `processes` are those that this process owns.

    Raises EngineError, with `advice` for the user, if a server is not healthy in time or its process has ended.
    """
    deadline = time.monotonic() + limit
    for client in clients:
        while not await client.healthy():
            if ended := [one for one in processes if not one.alive]:
                raise EngineError(f"The vLLM server did not start. {ended[0].log_end()}")
            if time.monotonic() > deadline:
                raise EngineError(f"{client.url}: no healthy vLLM server within {limit:.0f} s. {advice}")
            await asyncio.sleep(_POLL_S)


async def gather_while_healthy(clients: Sequence[ServerClient], work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Await all coroutines, which send requests to the servers, and return their results in order.

    A server whose engine has died may keep a request open forever, so every server's health is watched meanwhile.

    Raises:
        LostServerError: a server is no longer healthy. All coroutines are then cancelled.
    """
    tasks = [asyncio.ensure_future(each) for each in work]
    watches = {asyncio.ensure_future(client.until_lost()): client for client in clients}
    done = asyncio.gather(*tasks)
    awaited: list[asyncio.Future[Any]] = [done, *watches]
    try:
        await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        lost = [client.url for watch, client in watches.items() if watch.done()]
        raise LostServerError(f"{', '.join(lost)}: no longer healthy")
    finally:
        for each in (*tasks, *watches):
            each.cancel()
        await asyncio.gather(done, *tasks, *watches, return_exceptions=True)
