"""ASGI middleware of a vLLM server that requires the key on every path. vLLM imports it (`--middleware`).

vLLM's own check covers `/v1` and similar paths, but not those that load weights.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]

_OPEN = "/health"
_POLICY_VIOLATION = 1008
_REFUSAL = b'{"error": "a key is required: Authorization: Bearer ..."}'


class KeyGuard:
    """Rejects requests and websockets without the key in the server's `VLLM_API_KEY`. Without one all of them pass."""

    def __init__(self, app: App) -> None:
        self._app = app
        key = os.environ.get("VLLM_API_KEY", "")
        self._expected = f"Bearer {key}".encode() if key else None

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        # "lifespan" is the server's own start and end, and no client's.
        is_open = scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == _OPEN)
        if self._expected is not None and not is_open:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                if scope["type"] != "http":
                    await send({"type": "websocket.close", "code": _POLICY_VIOLATION})  # refused before it is accepted
                    return
                headers = [(b"content-type", b"application/json")]
                await send({"type": "http.response.start", "status": 401, "headers": headers})
                await send({"type": "http.response.body", "body": _REFUSAL})
                return
        await self._app(scope, receive, send)
