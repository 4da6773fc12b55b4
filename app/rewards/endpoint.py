"""Base of rewards that ask a server over HTTP: many requests at once, retries, and limits of time and size."""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
import urllib.parse
import urllib.request
from collections.abc import Generator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from app.rewards.base import Reward, ScoreError
from datamodules.errors import UserError

if TYPE_CHECKING:
    import aiohttp

Json = Mapping[str, object]
SHOWN = 200
"""Characters of a server's text that a message shows."""
_VARIABLE = re.compile("[A-Z_][A-Z0-9_]*")
_MAX_BODY_BYTES = 16 * 2**20
_BACKOFF_S = 0.25
"""Pause before the first retry. It doubles with each."""
_FAILED_IN_ROW = 4
"""Requests in a row without an answer after which a server counts as down for one time limit."""


class EndpointError(ScoreError):
    """A request has no answer that can be used.

    Args:
        reason: why.
        timed_out: whether it took too long.
        again: whether the server could not be reached or is overloaded, so that another try may help.
        pause: seconds that the server asks to wait before it.
        content: whether the server refused what it was sent, and may answer other requests.
    """

    def __init__(
        self, reason: str, timed_out: bool = False, again: bool = False, pause: float = 0.0, content: bool = False
    ) -> None:
        super().__init__(reason, timed_out, refused=True)
        self.again, self.pause, self.content = again, pause, content


class EndpointReward(Reward):
    """Base of rewards that ask a server.

    Args:
        weight: factor of this reward in the optimised sum.
        correctness: whether this reward measures correctness; null decides by the other rewards (see `Reward`).
        name: name in logged metrics.
        urls: servers, asked in turn.
        api_key_env: environment variable that holds the key, sent as `Authorization: Bearer KEY`.
        concurrency: requests in flight at once, of all workers of a rank together.
        retries: further tries of a request that got no answer.
        time_limit_s: seconds for a request, its retries included.

    Raises:
        UserError: an option is out of range, a URL is none or holds a password, or `api_key_env` names no variable.
    """

    preload = ("aiohttp",)

    def __init__(
        self,
        weight: float,
        correctness: bool | None,
        name: str | None,
        urls: Sequence[str],
        api_key_env: str | None,
        concurrency: int,
        retries: int,
        time_limit_s: float,
    ) -> None:
        super().__init__(weight, correctness, name)
        kind = f"app.rewards.{type(self).__name__}"
        if not urls:
            raise UserError(f"url of {kind} is an empty list, expected at least one URL. Add one.")
        for url in urls:
            parts = urllib.parse.urlsplit(url)
            if parts.username or parts.password:
                raise UserError(
                    f"url of {kind} holds a name or password, which would be written into configs and logs. Put the "
                    "key into an environment variable, and its name into api_key_env."
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise UserError(f"url of {kind} is {url!r}, expected e.g. http://127.0.0.1:5000/get_reward. Change it.")
        if api_key_env is not None and not _VARIABLE.fullmatch(api_key_env):
            raise UserError(  # it may be the key itself
                f"api_key_env of {kind} is not the name of an environment variable in capitals. Set it to one, e.g. "
                "JUDGE_API_KEY, and put the key into that variable."
            )
        for option, value, least in (
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("time_limit_s", time_limit_s, 1e-3),
        ):
            if not least <= value < float("inf"):
                raise UserError(f"{option} of {kind} is {value}, but must be at least {least}. Change it.")
        self.urls, self.api_key_env = list(urls), api_key_env
        self.concurrency, self.retries, self.time_limit_s = concurrency, retries, time_limit_s
        self.seconds_per_score = time_limit_s + 2.0  # to write requests, and to read what has come
        self._turn = count()
        self._down, self._down_since = 0, 0.0

    def load(self) -> None:
        import aiohttp  # noqa: F401

        self._key()

    def _key(self) -> str:
        if self.api_key_env is None:
            return ""
        key = os.environ.get(self.api_key_env, "").strip()
        if not key.isascii() or not key.isprintable() or not key:
            raise UserError(
                f"Reward {self.name!r} takes its key from the environment variable {self.api_key_env}, which is "
                f"{'no line of plain text' if key else 'not set'}. Export it, or remove api_key_env."
            )
        return key

    def answers(self, bodies: Sequence[Json]) -> Generator[Any]:
        """Post requests, several at once, and yield the JSON of each answer in order, or the `EndpointError`.

        When one is yielded, all earlier ones have ended and the next has begun, because slots are given in order. So
        none takes longer than the time limit of one request.
        """
        loop = asyncio.new_event_loop()
        tasks: list[asyncio.Task[Any]] = []
        session = loop.run_until_complete(self._session())
        slots = asyncio.Semaphore(max(1, self.concurrency // self.sharing_workers))
        try:
            tasks = [loop.create_task(self._answer(session, slots, body)) for body in bodies]
            for task in tasks:
                yield loop.run_until_complete(task)
        finally:
            for task in tasks:
                task.cancel()
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
            loop.run_until_complete(session.close())
            loop.close()

    async def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        headers = {"Authorization": f"Bearer {key}"} if (key := self._key()) else {}
        connect = self.time_limit_s / (1 + self.retries)  # so that there is time to try another server
        return aiohttp.ClientSession(
            headers=headers,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, connect=connect),
        )

    async def _answer(self, session: aiohttp.ClientSession, slots: asyncio.Semaphore, body: Json) -> Any:
        async with slots:
            if self._down >= _FAILED_IN_ROW and time.monotonic() < self._down_since + self.time_limit_s:
                return EndpointError("not asked, because the requests before it got no answer")
            try:
                answer = await self._within_limit(session, body)
            except EndpointError as error:
                self._down = 0 if error.content else self._down + 1
                self._down_since = time.monotonic()
                return error
            self._down = 0
            return answer

    async def _within_limit(self, session: aiohttp.ClientSession, body: Json) -> Any:
        """Post a request, again where that may help, and return the JSON of the answer."""
        last = ""
        try:
            async with asyncio.timeout(self.time_limit_s) as limit:
                for tries in count(1):
                    try:
                        return await self._post(session, self.urls[next(self._turn) % len(self.urls)], body)
                    except EndpointError as error:
                        if not error.again or tries > self.retries:
                            raise
                        pause, last = max(_BACKOFF_S * 2 ** (tries - 1), error.pause), f", the last: {error}"
                        if asyncio.get_running_loop().time() + pause > (limit.when() or 0.0):
                            raise
                    await asyncio.sleep(pause)
        except TimeoutError:
            places = " or ".join(map(_shown, self.urls))
            reason = f"no answer from {places} within time_limit_s={self.time_limit_s:g} s{last}"
            raise EndpointError(reason, timed_out=True) from None

    async def _post(self, session: aiohttp.ClientSession, url: str, body: Json) -> Any:
        import aiohttp

        place = _shown(url)
        try:
            # A redirect would take the prompts and the key to another server.
            async with session.post(url, json=body, allow_redirects=False, proxy=_proxy(url)) as response:
                status, content = response.status, await response.content.read(_MAX_BODY_BYTES)
                while len(content) < _MAX_BODY_BYTES and (more := await response.content.read(_MAX_BODY_BYTES)):
                    content += more
                if len(content) >= _MAX_BODY_BYTES:
                    raise EndpointError(f"{place}: the answer has more than {_MAX_BODY_BYTES >> 20} MiB")
                after = response.headers.get("Retry-After", "")
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ServerDisconnectedError) as error:
            raise EndpointError(f"{place}: no connection ({self._told(str(error))})", again=True) from None
        except (aiohttp.ClientError, OSError) as error:
            told = self._told(f"{type(error).__name__}: {error}")
            raise EndpointError(f"{place}: the connection broke ({told})", again=True) from None
        text = content.decode(errors="replace")
        if key := self._key():  # some servers say which key is wrong
            text = text.replace(key, f"<{self.api_key_env}>")
        if not 200 <= status < 300:
            told = f": {self._told(text)}" if text.strip() else ""
            if status in (401, 403):
                told += f" (the key is that in {self.api_key_env})" if self.api_key_env else " (api_key_env is not set)"
            raise EndpointError(
                f"{place}: HTTP {status}{told}",
                again=status in (408, 425, 429) or status >= 500,
                pause=float(after) if after.isdecimal() else 0.0,
                content=status in (400, 413, 422, 500),
            )
        try:
            return json.loads(text)
        except ValueError:
            told = self._told(text) or "nothing"
            raise EndpointError(f"{place}: the answer is not JSON: {told}", content=True) from None

    def _told(self, text: str) -> str:
        """Return the beginning of a text as one line."""
        return " ".join(text[: 5 * SHOWN].split())[:SHOWN]


def _shown(url: str) -> str:
    """Return a URL as messages show it, without its query, which may hold a key."""
    return url.partition("?")[0]


def _proxy(url: str) -> str | None:
    """Return the proxy that the environment names for a URL; none for this machine."""
    parts = urllib.parse.urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "127.0.0.1", "::1") or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)
