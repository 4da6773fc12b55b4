"""The servers of an engine: started or joined, given weights, and replaced when they are lost."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch

from app.engines.base import Weights
from app.engines.requests import EngineError
from app.engines.server.client import LostServerError, ServerClient, until_healthy
from app.engines.server.endpoints import TOKENS, choose_endpoints
from app.engines.server.loop_thread import LoopThread
from app.engines.server.options import FleetOptions, full_environment
from app.engines.server.placement import server_gpus, visible_gpus
from app.engines.server.process import ServerProcess, free_port
from app.engines.server.rank_zero import on_rank_zero
from app.engines.wire.push import WeightPusher
from app.ranks import Ranks
from datamodules.errors import UserError

T = TypeVar("T")

_START_ONE = "Start one with `dots serve`, or remove engine.url to start one in the run."
_SETTLE_S = 1.0
"""Delay before a lost server is probed again: its HTTP interface may outlive its engine for a moment."""


class ServerFleet:
    """All servers that one engine generates with. They are ready once the fleet is constructed.

    With several trainer processes, rank 0 starts or joins the servers and sends them the weights, and every rank
    requests its own completions. The constructor, `push`, `holds`, `require` and `recover` are collective.

    Args:
        options: the engine's options.
        policy_path: folder that the fleet's own servers load first.
        policy_dtype: dtype of the policy's files.
        folder: where the logs of the fleet's own servers are written; None leaves their output on the terminal.
        ranks: the trainer's processes.
        device: of this process's policy.

    Attributes:
        clients: one per server.
        loop: event loop of the clients.
        limit: maximum number of tokens of a prompt and its completion together.
        version: version that all workers received last; None before the first push and after a failed one.
        processes: the fleet's own servers.
    """

    def __init__(
        self,
        options: FleetOptions,
        policy_path: str,
        policy_dtype: torch.dtype,
        folder: Path | None,
        ranks: Ranks,
        device: torch.device,
    ) -> None:
        self.options = options
        self.version: int | None = None
        self.processes: list[ServerProcess] = []
        self.loop = LoopThread()
        self.clients: list[ServerClient] = []
        self._policy_path, self._policy_dtype = policy_path, policy_dtype
        self._folder = folder
        self._ranks = ranks
        self._key = os.environ.get(options.api_key_variable, "")
        self._losses = 0
        self._lack_reported = False
        try:
            self._training = [] if options.urls else self._gpus_of_ranks(device)
            self._connect()
        except BaseException as error:
            self.close()
            if isinstance(error, LostServerError):
                raise EngineError(f"A vLLM server was lost right after its start ({error}). See its log.") from error
            raise

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Send the weights to all workers like `WeightPusher.push`.

        `named_tensors` is iterated on every rank, which may be a collective operation.
        """
        self.version = None
        tensors = iter(named_tensors)

        def send() -> None:
            try:
                self._pusher.push(tensors, version, since)
            except (LostServerError, UserError):
                deque(tensors, maxlen=0)  # in step with the other ranks
                raise

        if self._ranks.rank:
            deque(tensors, maxlen=0)
        on_rank_zero(self._ranks, send, "push of weights")
        self.version = version

    def holds(self, version: int) -> bool:
        """Return whether all workers hold the version. Raises LostServerError if a server does not answer."""
        return self._held() == [str(version)]

    def require(self, version: int, weights: Weights) -> None:
        """Make sure that all workers hold the version, e.g. after a server was restarted by its owner.

        Raises EngineError if the servers are lost too often or do not load the weights.
        """
        while True:
            try:
                found = self._held()
                if found == [str(version)]:
                    return
                problem = f"vLLM workers hold versions {', '.join(found)} instead of {version}"
                self._count_loss(problem)
                self._report(f"{problem}: pushing the weights again")
                self.push(weights(), version)
            except LostServerError as lost:
                self.recover(lost, version, weights)

    def recover(self, lost: LostServerError, version: int, weights: Weights) -> None:
        """Bring all servers up again and push the weights.

        Raises EngineError if the servers are lost too often, or do not come up in time.
        """
        while True:
            self._count_loss(str(lost))
            try:
                self._connect(lost)
                self.push(weights(), version)
                return
            except LostServerError as again:
                lost = again

    def succeeded(self) -> None:
        """Start to count losses from zero."""
        self._losses = 0

    def close(self) -> None:
        """Cancel all requests and end the fleet's own servers."""
        self.loop.run(self._disconnect())
        self.loop.close()
        self._end_own()

    def _held(self) -> list[str]:
        """Return the versions that workers hold."""
        return on_rank_zero(self._ranks, lambda: sorted(set(self._pusher.versions())), "versions of the weights")

    def _count_loss(self, reason: str) -> None:
        self._losses += 1
        if self._losses > self.options.max_restarts:
            ended = [one for one in self.processes if not one.alive] or self.processes
            log = f" {ended[0].log_end()}" if ended else ""
            raise EngineError(
                f"vLLM servers were lost {self._losses} times in a row ({reason}), but engine.max_restarts is "
                f"{self.options.max_restarts}. Check the servers.{log}"
            )

    def _connect(self, lost: LostServerError | None = None) -> None:
        """Start or join the servers on all ranks, for the first time or after a loss."""
        found = on_rank_zero(self._ranks, lambda: self._bring_up(lost), "vLLM servers")
        urls, self._key, self.limit, lacking = found
        if self._ranks.rank:
            self.loop.run(self._disconnect())
            first = self._ranks.rank % len(urls)  # ranks start with different servers
            self.clients = [self._client(url) for url in (*urls[first:], *urls[:first])]
        for client in self.clients:
            client.endpoints = choose_endpoints(self.options.endpoint, lacking)

    def _bring_up(self, lost: LostServerError | None) -> tuple[list[str], str, int, list[str]]:
        """Start or join the servers on rank 0. Return their urls, key, limit, and the urls of those without TOKENS."""
        options = self.options
        if not options.urls:
            if lost is not None:
                self._report(f"the vLLM server is lost ({lost}): starting it again")
                self.loop.run(self._disconnect())
            self._end_own()
            self._start_own()
            limit, advice = options.start_timeout_s, "Look into its log or raise engine.start_timeout_s."
        else:
            if lost is None:
                self.clients = [self._client(url) for url in options.urls]
            else:
                self._report(f"a vLLM server is lost ({lost}): waiting up to {options.wait_s:.0f} s for it")
                time.sleep(_SETTLE_S)
            limit, advice = options.wait_s, _START_ONE
        self.loop.run(until_healthy(self.clients, self.processes, limit, advice))
        self._pusher = WeightPusher(
            self.loop, self.clients, options.transport, options.trainer_address, options.chunk_mib * 2**20
        )
        max_model_len = min(self.loop.run(client.max_model_len()) for client in self.clients)
        return [client.url for client in self.clients], self._key, max_model_len, self._lacking_tokens()

    def _lacking_tokens(self) -> list[str]:
        """Ask the servers for the endpoint for token ids, if it may be used, and return the urls of those without it.

        Raises:
            UserError: see `choose_endpoints`.
        """
        if self.options.endpoint == "completions":
            return []
        lacking = [client.url for client in self.clients if not self.loop.run(client.offers(TOKENS))]
        chosen = choose_endpoints(self.options.endpoint, lacking)
        if lacking and not self._lack_reported:
            self._lack_reported = True
            self._report(
                f"{lacking[0]} does not list {TOKENS.path} in its /openapi.json (--enable-scale-out): completions come "
                f"from {chosen.without_stop.path}, which costs more time per token"
            )
        return lacking

    def _start_own(self) -> None:
        server = self.options.server
        self._key = self._key or secrets.token_urlsafe(32)
        self.clients = []
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        for number, gpus in enumerate(server_gpus(server.devices, server.tensor_parallel_size, self._training)):
            port = server.port + number if server.port else free_port(server.host)
            command = server.command(self._policy_path, self._policy_dtype, port)
            log = None if self._folder is None else self._folder / (f"server_{number}.log" if number else "server.log")
            self.processes.append(ServerProcess(command, full_environment(server.environment(gpus), self._key), log))
            self.clients.append(self._client(server.url(port)))

    def _end_own(self) -> None:
        for process in self.processes:
            process.end()
        for process in self.processes:
            process.close()
        self.processes = []

    def _gpus_of_ranks(self, device: torch.device) -> list[int]:
        """Return the indices of the GPUs that rank 0 shares with training processes of its machine. Collective."""
        used = visible_gpus()[device.index or 0] if device.type == "cuda" else ""
        here = f"{socket.gethostname()} {used}".encode()
        names = {one.partition(b" ")[2].decode() for one in self._ranks.gather(here, "GPUs of all ranks")
                 if one.startswith(socket.gethostname().encode() + b" ")}  # fmt: skip
        return [index for index, name in enumerate(visible_gpus()) if name in names]

    def _client(self, url: str) -> ServerClient:
        options = self.options
        share = -(-options.concurrency // self._ranks.size)
        return ServerClient(url, self._key, options.api_key_variable, share, options.request_timeout_s)

    async def _disconnect(self) -> None:
        await asyncio.gather(*(client.close() for client in self.clients))

    def _report(self, line: str) -> None:
        if self._ranks.rank == 0:
            print("dots:", " ".join(line.split()), file=sys.stderr, flush=True)


def ask_running(options: FleetOptions, ask: Callable[[ServerClient], Coroutine[Any, Any, T]]) -> list[T]:
    """Return the answer of each of the servers of `url` to a question, e.g. `ServerClient.max_model_len`.

    Raises:
        UserError: a server is not healthy in time, or does not tell.
    """
    key = os.environ.get(options.api_key_variable, "")
    clients = [ServerClient(url, key, options.api_key_variable, 1, options.request_timeout_s) for url in options.urls]

    async def ask_all() -> list[T]:
        try:
            await until_healthy(clients, [], options.wait_s, _START_ONE)
            return [await ask(client) for client in clients]
        except LostServerError as error:
            raise EngineError(f"A vLLM server was lost when it was asked what it offers ({error}).") from error
        finally:
            for client in clients:
                await client.close()

    loop = LoopThread()  # the caller may run in a loop of its own, as in a notebook
    try:
        return loop.run(ask_all())
    finally:
        loop.close()
