"""Rollouts by vLLM servers: processes of their own, on this machine or on others."""

from __future__ import annotations

import asyncio
import atexit
import os
import secrets
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from app.engines.base import RolloutEngine, Sampling
from app.engines.checks import check_request
from app.engines.loop_thread import LoopThread
from app.engines.server_client import ServerClient, ServerGone
from app.engines.server_options import ServerOptions, full_environment
from app.engines.server_process import ServerProcess, free_port
from app.engines.stopping import end_token_ids
from app.engines.vllm_common import Answer, EngineError, completions_of, request_fields
from app.engines.weight_push import Transport, WeightPusher
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

LOG = "server.log"
_POLL = 0.25


class VllmServer(RolloutEngine):
    """Generates with vLLM over HTTP, token ids in and out.

    Without `url` it starts a server when the run starts (its output goes to `server.log` in the run's folder) and ends
    it with the run. With `url` it uses servers that someone else runs, as `dots serve` starts them; prompts are spread
    over them, all completions of a prompt on one server, whose prefix cache then reads the prompt once.

    When a server is lost, the run says so in one line, starts it again (or waits until whoever owns it has), pushes
    the weights, and asks again for those completions alone that it did not get.

    Args:
        url: of the server, or of several; null starts one.
        server: how a server of the run's own is started.
        api_key_variable: environment variable that holds the key; a server of the run's own gets a random key when
            there is none.
        max_concurrency: requests on their way to one server at a time.
        request_timeout_s: seconds that one completion may take.
        start_timeout_s: seconds that a server may take until it is healthy.
        wait_s: seconds to wait for a lost server that someone else runs.
        max_restarts: losses of a server within one step after which the run stops.
        transport: how weights travel: "shared_memory" to servers of this machine, "process_group" (gloo, NCCL with
            CUDA) to others; "auto" decides by the urls.
        trainer_address: of this machine, as the servers reach it; for the process group.
        chunk_mib: weights sent at a time; bounds the memory of a push.
    """

    def __init__(
        self,
        url: list[str] | str | None = None,
        server: ServerOptions = ServerOptions(),  # noqa: B008  # jsonargparse shows the defaults of a dataclass only so
        api_key_variable: str = "VLLM_API_KEY",
        max_concurrency: int = 256,
        request_timeout_s: float = 3600.0,
        start_timeout_s: float = 300.0,
        wait_s: float = 300.0,
        max_restarts: int = 3,
        transport: Transport = "auto",
        trainer_address: str = "127.0.0.1",
        chunk_mib: int = 256,
    ) -> None:
        for name, given in (("max_concurrency", max_concurrency), ("chunk_mib", chunk_mib)):
            if given < 1:
                raise UserError(f"engine.{name}={given}: expected at least 1")
        self.urls = [url] if isinstance(url, str) else list(url or [])
        for each in self.urls:
            if not each.startswith(("http://", "https://")):
                raise UserError(f"engine.url={each}: expected http://HOST:PORT")
        self.server = server
        self.api_key_variable = api_key_variable
        self.max_concurrency = max_concurrency
        self.request_timeout_s = request_timeout_s
        self.start_timeout_s = start_timeout_s
        self.wait_s = wait_s
        self.max_restarts = max_restarts
        self.transport = transport
        self.trainer_address = trainer_address
        self.chunk_mib = chunk_mib
        self.version: int | None = None
        self.process: ServerProcess | None = None
        self._owns = not self.urls
        self._key = os.environ.get(api_key_variable, "")
        self._loop: LoopThread | None = None
        self._clients: list[ServerClient] = []
        self._losses = 0

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `RolloutEngine.push`. A server that is lost meanwhile is replaced, and given the weights as they are now.

        Raises:
            EngineError: a server did not take the weights. It stays paused.
        """
        self._connect()
        try:
            self._push(named_tensors, version)
        except ServerGone as gone:
            self.version = version
            self._recover(gone)
        self._losses = 0

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray
    ) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt has no tokens, or no room for a completion in the servers' limit.
            EngineError: servers are lost again and again, or hold other weights than they were given.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        if len(prompts) == 0:
            return []
        self._connect()
        limit = self._limit
        check_request(prompts, sampling, seeds, limit, f"the server's {limit} tokens (max_model_len)")
        if self.version is None:
            # Nobody has pushed yet (a validation of a checkpoint): the server has the weights of its files.
            self.push(self.weights(), 0)
        assert self.version is not None
        ends = end_token_ids(self.model, self.tokenizer)
        requests = [
            ({"prompt": list(prompt.token_ids), **request_fields(sampling, ends, seed)}, b)
            for b, prompt in enumerate(prompts)
            for seed in seeds[b]
        ]
        return completions_of(self._answers(requests), sampling, self.tokenizer, self.version)

    def close(self) -> None:
        """Breaks off what is being generated, and ends the server that is the engine's own."""
        atexit.unregister(self.close)
        if self._loop is not None:
            self._loop.run(self._disconnect())
            self._loop.close()
            self._loop = None
        if self.process is not None:
            self.process.close()
            self.process = None
        self._clients = []
        self.version = None

    def _answers(self, requests: Sequence[tuple[dict[str, Any], int]]) -> list[Answer]:
        """Of every request and its prompt's number; those of a lost server are asked for again."""
        answers: list[Answer | None] = [None] * len(requests)
        while missing := [index for index, answer in enumerate(answers) if answer is None]:
            try:
                self._require_version()
                self._running.run(self._ask(requests, missing, answers))
            except ServerGone as gone:
                self._recover(gone)
        self._losses = 0
        return [answer for answer in answers if answer is not None]

    async def _ask(
        self, requests: Sequence[tuple[dict[str, Any], int]], missing: Sequence[int], answers: list[Answer | None]
    ) -> None:
        """Fills in the missing answers, as many as can be had."""

        async def one(index: int) -> None:
            fields, prompt = requests[index]
            answers[index] = await self._clients[prompt % len(self._clients)].complete(fields)

        found = await asyncio.gather(*map(one, missing), return_exceptions=True)
        errors = [each for each in found if isinstance(each, BaseException)]
        # What asking again cannot cure comes first.
        for error in sorted(errors, key=lambda each: isinstance(each, ServerGone)):
            raise error

    def _require_version(self) -> None:
        """Before anything is generated: the servers have what was pushed last.

        A server that was started anew behind our back is given it.
        """
        found = self._pusher.versions()
        if set(found) != {str(self.version)}:
            _say(f"vLLM workers hold versions {', '.join(found)} in place of {self.version}: pushing the weights again")
            self._lose_one(f"they hold versions {', '.join(found)} in place of {self.version}")
            self._push(self.weights(), self.version or 0)

    def _push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.version = None
        self._pusher.push(named_tensors, version)
        self.version = version

    def _recover(self, gone: ServerGone) -> None:
        """Has the servers up again, with the weights of `self.version`."""
        version = self.version or 0
        while True:
            self._lose_one(str(gone))
            if self._owns:
                _say(f"the vLLM server is lost ({gone}): starting it again")
                self._restart()
            else:
                _say(f"a vLLM server is lost ({gone}): waiting for it, {self.wait_s:.0f} s at most")
                self._await_health(self.wait_s)
            try:
                self._pusher = self._new_pusher()
                self._push(self.weights(), version)
                return
            except ServerGone as again:
                gone = again
                self.version = version

    def _lose_one(self, reason: str) -> None:
        self._losses += 1
        if self._losses > self.max_restarts:
            log = f"; its log ends: {self.process.last_line()}" if self.process else ""
            raise EngineError(f"vLLM servers were lost {self._losses} times in a row: {reason}{log}")

    def _connect(self) -> None:
        """Starts or joins the servers, once."""
        if self._loop is not None:
            return
        self._loop = LoopThread()
        atexit.register(self.close)
        if self._owns:
            self._start()
        else:
            self._clients = [self._client(url) for url in self.urls]
            self._await_health(self.wait_s)
        self._limit = min(self._running.run(client.max_model_len()) for client in self._clients)
        self._pusher = self._new_pusher()

    @property
    def _running(self) -> LoopThread:
        assert self._loop is not None
        return self._loop

    def _client(self, url: str) -> ServerClient:
        return ServerClient(url, self._key, self.api_key_variable, self.max_concurrency, self.request_timeout_s)

    def _new_pusher(self) -> WeightPusher:
        dtype = None if self.server.dtype == "auto" else getattr(torch, self.server.dtype)
        return WeightPusher(
            self._running, self._clients, self.transport, self.trainer_address, dtype, self.chunk_mib * 2**20
        )

    def _start(self) -> None:
        self._key = self._key or secrets.token_urlsafe(32)
        port = self.server.port or free_port(self.server.host)
        command = self.server.command(self.model.name_or_path, self.model.dtype, port)
        log = None if self.folder is None else self.folder / LOG
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self.process = ServerProcess(command, full_environment(self.server.environment(), self._key), log)
        self._clients = [self._client(f"http://{self.server.host}:{port}")]
        self._await_health(self.start_timeout_s)

    def _restart(self) -> None:
        self._running.run(self._disconnect())
        assert self.process is not None
        self.process.close()
        self._start()

    def _await_health(self, limit: float) -> None:
        """Returns when all servers are healthy."""
        deadline = time.monotonic() + limit
        for client in self._clients:
            while not self._running.run(client.healthy()):
                if self.process is not None and not self.process.alive:
                    raise EngineError(f"the vLLM server did not start; its log ends: {self.process.last_line()}")
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"{client.url}: no healthy vLLM server within {limit:.0f} s; start one with `dots serve`, "
                        "or leave engine.url out so that the run starts its own"
                    )
                time.sleep(_POLL)

    async def _disconnect(self) -> None:
        await asyncio.gather(*(client.close() for client in self._clients))


def _say(line: str) -> None:
    print("dots:", " ".join(line.split()), file=sys.stderr, flush=True)
