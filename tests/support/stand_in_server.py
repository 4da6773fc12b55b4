"""A small HTTP server with vLLM's paths, whose answers a test can spoil: what a server is that is not the policy's.

As a process of its own, `python stand_in_server.py PORT`, it does not read the weights that it is sent.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Spoiled = Callable[[BaseHTTPRequestHandler, dict[str, Any]], object]
"""Returns what is sent in place of the right answer: an object as JSON, bytes as they are, None if it has sent all."""

COMPLETIONS, TOKENS = "/v1/completions", "/inference/v1/generate"
COMPLETION = "a completion"
"""Either of them."""


@dataclass(frozen=True)
class Asked:
    """A request for a completion, from either endpoint."""

    token_ids: list[int]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Written:
    """The completion of a request."""

    token_ids: list[int]
    logprobs: Sequence[object]
    finish_reason: str

    def sent(self, path: str) -> dict[str, Any]:
        """Return the completion as the endpoint of a path sends it."""
        logprobs: dict[str, Any] = {"token_logprobs": list(self.logprobs)}
        if path == TOKENS:
            pairs = zip(self.token_ids, self.logprobs, strict=True)
            logprobs = {"content": [{"token_id": token, "logprob": one} for token, one in pairs]}
        return {"token_ids": self.token_ids, "logprobs": logprobs, "finish_reason": self.finish_reason}


def fives(asked: Asked) -> Written:
    """Return the token 5 until the length limit."""
    length = asked.settings["max_tokens"]
    return Written([5] * length, [-0.5] * length, "length")


@dataclass
class StandIn:
    """The state of a server.

    Attributes:
        spoiled: by path (or COMPLETION), what is sent in place of the right answer.
        write: completes a prompt.
        offers_tokens: whether it has the endpoint for token ids.
        seen: paths of the requests so far.
        asked: the requests for completions so far.
        url: of the server.
        version: of the last push.
        weights: number of tensors that the last push has sent.
        reads: whether it reads them.
    """

    spoiled: dict[str, Spoiled] = field(default_factory=dict)
    write: Callable[[Asked], Written] = fives
    offers_tokens: bool = True
    seen: list[str] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    version: str = "None"
    weights: int = 0
    reads: bool = True

    @property
    def completions(self) -> int:
        """Number of requests for completions so far."""
        return self.seen.count(COMPLETIONS) + self.seen.count(TOKENS)

    def answer(self, path: str, body: dict[str, Any]) -> object:
        """Return the answer of a right server."""
        if path == "/openapi.json":
            return {"paths": {COMPLETIONS: {}} | ({TOKENS: {}} if self.offers_tokens else {})}
        if path == "/get_world_size":
            return {"world_size": 1}
        if path == "/seen":
            return {"completions": self.completions}
        if path == "/v1/models":
            return {"data": [{"max_model_len": 512}]}
        if path in (COMPLETIONS, TOKENS):
            tokens = path == TOKENS
            asked = Asked(body["token_ids"], body["sampling_params"]) if tokens else Asked(body["prompt"], body)
            self.asked.append(asked)
            return {"choices": [self.write(asked).sent(path)]}
        if path == "/collective_rpc":
            method, arguments = body["method"], body["kwargs"]
            if method == "dots_load_file" and self.reads:
                from app.engines.wire.chunks import from_json  # imports torch
                from app.engines.wire.shared_file import read_chunk

                self.weights += len(read_chunk(arguments["path"], from_json(arguments["specs"])))
            if method == "dots_finish":
                self.version = arguments["version"]
            facts = json.dumps({"gpu": "", "dtype": "float32"})
            return {"results": [{"dots_version": self.version, "dots_facts": facts}.get(method)]}
        return {"success": True}


@contextmanager
def stand_in(port: int = 0, reads: bool = True) -> Iterator[StandIn]:
    """Run a server until the end of the block."""
    state = StandIn(reads=reads)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.handle_request({})

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.handle_request(json.loads(content) if content else {})

        def handle_request(self, body: dict[str, Any]) -> None:
            path = self.path.partition("?")[0]
            state.seen.append(path)
            spoiled = state.spoiled.get(COMPLETION if path in (COMPLETIONS, TOKENS) else path)
            if path == TOKENS and not state.offers_tokens:
                self.send_error(403)
                return
            sent = spoiled(self, body) if spoiled else state.answer(path, body)
            if sent is None:
                return
            content = sent if isinstance(sent, bytes) else json.dumps(sent).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield state
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    with stand_in(int(sys.argv[1]), reads=False):
        while True:
            time.sleep(60)
