"""A real HTTP server for rewards that ask one: answers by a function, and keeps what it was asked."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Asked:
    """A request: where it went, with which headers and body."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """An answer that is more than JSON with status 200."""

    status: int = 200
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class RewardServer:
    """The state of a server.

    Attributes:
        answer: returns the answer to a request, by which number it is (from 0): JSON, or `Sent`.
        asked: the requests so far.
        most: most requests that were in flight at once.
        url: of the server.
    """

    answer: Callable[[Asked, int], object]
    asked: list[Asked] = field(default_factory=list)
    most: int = 0
    url: str = ""

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [one.body for one in self.asked]


@contextmanager
def reward_server(answer: Callable[[Asked, int], object]) -> Iterator[RewardServer]:
    """Run a server until the end of the block."""
    state = RewardServer(answer)
    lock = threading.Lock()
    open_now = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            nonlocal open_now
            content = self.rfile.read(int(self.headers["Content-Length"]))
            asked = Asked(self.path, dict(self.headers), json.loads(content))
            with lock:
                number = len(state.asked)
                state.asked.append(asked)
                open_now += 1
                state.most = max(state.most, open_now)
            try:
                given = state.answer(asked, number)
            finally:
                with lock:
                    open_now -= 1
            sent = given if isinstance(given, Sent) else Sent(content=json.dumps(given).encode())
            self.send_response(sent.status)
            for name, value in {**sent.headers, "Content-Length": str(len(sent.content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(sent.content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # a client that has given up

    with Server(("127.0.0.1", 0), Handler) as server:
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()
            server.block_on_close = False


def closed_port() -> str:
    """Return the URL of a port on which nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return f"http://127.0.0.1:{server.server_port}"
