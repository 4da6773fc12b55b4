"""Inside a vLLM server: asks for the key on every path. Imported by vLLM (`--middleware`), not by us.

vLLM's own check covers `/v1` and its like, not the paths by which weights are loaded.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable
from typing import Any

_OPEN = "/health"
_REFUSAL = b'{"error": "a key is needed: Authorization: Bearer ..."}'


class KeyGuard:
    """ASGI middleware: without `VLLM_API_KEY` in the server's environment all may pass."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app
        key = os.environ.get("VLLM_API_KEY", "")
        self._expected = f"Bearer {key}".encode() if key else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if self._expected is None or scope["type"] != "http" or scope["path"] == _OPEN or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 401, "headers": headers})
        await send({"type": "http.response.body", "body": _REFUSAL})

    def _is_known(self, scope: dict[str, Any]) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
