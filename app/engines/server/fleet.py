"""The servers of an engine: started or joined, given weights, and brought back when they are lost."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from app.engines.base import Weights
from app.engines.requests import EngineError
from app.engines.server.client import ServerClient, ServerGone
from app.engines.server.first_rank import by_first
from app.engines.server.loop_thread import LoopThread
from app.engines.server.options import ServerOptions, full_environment
from app.engines.server.process import ServerProcess, free_port
from app.engines.wire.push import Transport, WeightPusher
from app.ranks import Ranks
from datamodules.errors import UserError

LOG = "server.log"
_POLL = 0.25
_SETTLING = 1.0
"""Seconds before a lost server is asked again: its interface may outlive its engine for a moment."""


@dataclass(frozen=True, slots=True)
class FleetOptions:
    """What `VllmServer` was configured with; its arguments say what each means."""

    urls: tuple[str, ...]
    server: ServerOptions
    api_key_variable: str
    max_concurrency: int
    request_timeout_s: float
    start_timeout_s: float
    wait_s: float
    max_restarts: int
    transport: Transport
    trainer_address: str
    chunk_mib: int


class ServerFleet:
    """All servers that one engine generates with. Ready when it is made.

    With several trainer processes rank 0 starts or joins the servers and sends them the weights; each asks them for
    its own completions. All of them make it, and call `push`, `require` and `recover`, together.

    Args:
        options: of the engine.
        policy_path: what a server of its own loads first.
        policy_dtype: of the policy's weights.
        folder: where the log of a server of its own is written; None leaves it on the terminal.
        ranks: the trainer's processes.

    Attributes:
        clients: one for each server.
        loop: in which they live.
        limit: tokens that a prompt and its completion may have together.
        version: that all workers were given last; None before, and after a push that failed.
        process: the server of its own.
    """

    def __init__(
        self,
        options: FleetOptions,
        policy_path: str,
        policy_dtype: torch.dtype,
        folder: Path | None,
        ranks: Ranks = Ranks(),  # noqa: B008  # frozen
    ) -> None:
        self.options = options
        self.version: int | None = None
        self.process: ServerProcess | None = None
        self.loop = LoopThread()
        self.clients: list[ServerClient] = []
        self._policy_path, self._policy_dtype = policy_path, policy_dtype
        self._log = None if folder is None else folder / LOG
        self._ranks = ranks
        self._key = os.environ.get(options.api_key_variable, "")
        self._losses = 0
        try:
            self._begin()
        except BaseException as error:
            self.close()
            if isinstance(error, ServerGone):
                raise EngineError(f"a vLLM server was lost as soon as it was there: {error}") from error
            raise

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Gives all workers the weights.

        Args:
            named_tensors: every rank's; iterating them may need all ranks.
            version: of the policy.
            since: as for `WeightPusher.push`.

        Raises:
            EngineError: they did not arrive; the servers stay paused.
            ServerGone: a server does not answer.
        """
        self.version = None
        tensors = iter(named_tensors)

        def send() -> None:
            try:
                self._pusher.push(tensors, version, since)
            except (ServerGone, UserError):
                _exhaust(tensors)
                raise

        if self._ranks.rank:
            _exhaust(tensors)
        by_first(self._ranks, send, "push of weights")
        self.version = version

    def holds(self, version: int) -> bool:
        """Whether all workers have the version. Raises ServerGone when a server does not answer."""
        return self._held() == [str(version)]

    def require(self, version: int, weights: Weights) -> None:
        """Returns when all workers have the version: those of a server that was started anew are given it.

        Raises EngineError when they cannot be had.
        """
        while True:
            try:
                found = self._held()
                if found == [str(version)]:
                    return
                held = f"vLLM workers hold versions {', '.join(found)} in place of {version}"
                self._count_loss(held)
                self._say(f"{held}: pushing the weights again")
                self.push(weights(), version)
            except ServerGone as gone:
                self.recover(gone, version, weights)

    def recover(self, gone: ServerGone, version: int, weights: Weights) -> None:
        """Has all servers up again, with the weights.

        Raises EngineError after too many losses, or when nothing comes up in time.
        """
        while True:
            self._count_loss(str(gone))
            try:
                self._begin(gone)
                self.push(weights(), version)
                return
            except ServerGone as again:
                gone = again

    def succeeded(self) -> None:
        """Losses are counted from here on."""
        self._losses = 0

    def close(self) -> None:
        """Breaks off all requests, and ends the server of its own."""
        self.loop.run(self._disconnect())
        self.loop.close()
        if self.process is not None:
            self.process.close()

    def _held(self) -> list[str]:
        """Versions that workers have."""
        return by_first(self._ranks, lambda: sorted(set(self._pusher.versions())), "versions of the weights")

    def _count_loss(self, reason: str) -> None:
        self._losses += 1
        if self._losses > self.options.max_restarts:
            log = f"; its log ends: {self.process.last_line()}" if self.process else ""
            raise EngineError(f"vLLM servers were lost {self._losses} times in a row: {reason}{log}")

    def _begin(self, gone: ServerGone | None = None) -> None:
        """Starts or joins the servers; after a loss again."""
        told = by_first(self._ranks, lambda: self._up(gone), "vLLM servers")
        self.limit: int = told["limit"]
        if self._ranks.rank:
            self.loop.run(self._disconnect())
            self._key = told["key"]
            self.clients = [self._client(url) for url in told["urls"]]

    def _up(self, gone: ServerGone | None) -> dict[str, Any]:
        """The same on rank 0; what the others must know."""
        if self.options.urls:
            self._join(gone)
        else:
            self._start_own(gone)
        options = self.options
        self._pusher = WeightPusher(
            self.loop,
            self.clients,
            options.transport,
            options.trainer_address,
            None if options.server.dtype == "auto" else getattr(torch, options.server.dtype),
            options.chunk_mib * 2**20,
        )
        limit = min(self.loop.run(client.max_model_len()) for client in self.clients)
        return {"urls": [client.url for client in self.clients], "key": self._key, "limit": limit}

    def _join(self, gone: ServerGone | None) -> None:
        if gone is None:
            self.clients = [self._client(url) for url in self.options.urls]
        else:
            self._say(f"a vLLM server is lost ({gone}): waiting for it, {self.options.wait_s:.0f} s at most")
            time.sleep(_SETTLING)
        self._await_health(self.options.wait_s)

    def _start_own(self, gone: ServerGone | None) -> None:
        if gone is not None:
            self._say(f"the vLLM server is lost ({gone}): starting it again")
            self._end()
        self.clients = [self._client(self._start())]
        self._await_health(self.options.start_timeout_s)

    def _start(self) -> str:
        """Starts a server of its own; the url."""
        server = self.options.server
        self._key = self._key or secrets.token_urlsafe(32)
        port = server.port or free_port(server.host)
        command = server.command(self._policy_path, self._policy_dtype, port)
        if self._log is not None:
            self._log.parent.mkdir(parents=True, exist_ok=True)
        self.process = ServerProcess(command, full_environment(server.environment(), self._key), self._log)
        return f"http://{server.host}:{port}"

    def _end(self) -> None:
        assert self.process is not None
        self.loop.run(self._disconnect())
        self.process.close()

    def _client(self, url: str) -> ServerClient:
        options = self.options
        share = -(-options.max_concurrency // self._ranks.size)
        return ServerClient(url, self._key, options.api_key_variable, share, options.request_timeout_s)

    def _await_health(self, limit: float) -> None:
        """Returns when all servers are healthy."""
        deadline = time.monotonic() + limit
        for client in self.clients:
            while not self.loop.run(client.healthy()):
                if self.process is not None and not self.process.alive:
                    raise EngineError(f"the vLLM server did not start; its log ends: {self.process.last_line()}")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{client.url}: no healthy vLLM server within {limit:.0f} s; start one with `dots serve`, "
                        "or leave engine.url out so that the run starts its own"
                    )
                time.sleep(_POLL)

    async def _disconnect(self) -> None:
        await asyncio.gather(*(client.close() for client in self.clients))

    def _say(self, line: str) -> None:
        if self._ranks.rank == 0:
            print("dots:", " ".join(line.split()), file=sys.stderr, flush=True)


def _exhaust(tensors: Iterable[Any]) -> None:
    """To the end: the other ranks go there too."""
    deque(tensors, maxlen=0)
