"""Rollouts by vLLM servers: processes of their own, on this machine or on others."""

from __future__ import annotations

import asyncio
import atexit
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from app.engines.ahead import Ahead, timed
from app.engines.base import RolloutEngine, Sampling, check_request, end_token_ids
from app.engines.requests import Answer, completions_of, request_fields
from app.engines.server.client import ServerClient, ServerGone, together
from app.engines.server.first_rank import loss_of_any
from app.engines.server.fleet import FleetOptions, ServerFleet
from app.engines.server.options import ServerOptions
from app.engines.wire.push import Transport
from datamodules.errors import UserError
from datamodules.types import Completion, Prompt

_Request = tuple[int, dict[str, Any]]
"""Number of the prompt, which decides on the server, and what is asked of it."""


class VllmServer(RolloutEngine):
    """Generates with vLLM over HTTP, token ids in and out.

    Without `url` it starts a server when the run starts (its output goes to `server.log` in the run's folder) and ends
    it with the run. With `url` it uses servers that someone else runs, as `dots serve` starts them; prompts are spread
    over them, all completions of a prompt on one server, whose prefix cache then reads the prompt once.

    When a server is lost, the run says so in one line, starts it again (or waits until whoever owns it has), pushes
    the weights, and asks again for those completions alone that it did not get.

    With several trainer processes rank 0 starts or joins the servers, and sends them the weights; each process asks
    for its own share of the completions. Processes on other machines need a `server.host` that they can reach.

    It can generate one step's rollouts while another step trains (`callbacks.RolloutAhead`), in one trainer process.

    Args:
        url: of the server, or of several; null starts one.
        server: how a server of the run's own is started.
        api_key_variable: environment variable that holds the key; a server of the run's own gets a random key when
            there is none.
        max_concurrency: requests on their way to one server at a time, those of all trainer processes together.
        request_timeout_s: seconds that one completion may take.
        start_timeout_s: seconds that a server may take until it is healthy.
        wait_s: seconds to wait for a lost server that someone else runs.
        max_restarts: losses of a server within one step after which the run stops.
        transport: how weights travel: "shared_memory" to servers of this machine, "process_group" (gloo, NCCL with
            CUDA) to others; "auto" decides by the urls.
        trainer_address: of this machine, as the servers reach it; for the process group.
        chunk_mib: weights sent at a time; bounds the memory of a push.
    """

    runs_ahead = True

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
        urls = [url] if isinstance(url, str) else list(url or [])
        for each in urls:
            if not each.startswith(("http://", "https://")):
                raise UserError(f"engine.url={each}: expected http://HOST:PORT")
        self.options = FleetOptions(
            tuple(urls),
            server,
            api_key_variable,
            max_concurrency,
            request_timeout_s,
            start_timeout_s,
            wait_s,
            max_restarts,
            transport,
            trainer_address,
            chunk_mib,
        )
        self.fleet: ServerFleet | None = None
        self._ahead: Ahead | None = None

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """See `RolloutEngine.push`. A server that is lost meanwhile is replaced, and given the weights as they are now.

        Raises:
            EngineError: a server did not take the weights. It stays paused.
        """
        self.settle()
        fleet = self._connected()
        try:
            if since is not None and not fleet.holds(since):
                named_tensors, since = self.weights(), None
            fleet.push(named_tensors, version, since)
        except ServerGone as gone:
            fleet.recover(gone, version, self.weights)
        fleet.succeeded()

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray
    ) -> list[tuple[Completion, ...]]:
        """See `RolloutEngine.generate`.

        Raises:
            UserError: a prompt has no tokens, or no room for a completion in the servers' limit.
            EngineError: servers are lost again and again, or do not take the weights.
            FloatingPointError: the policy's logits are NaN or infinite.
        """
        if len(prompts) == 0 and self.ranks.size == 1:
            return []
        requests, version = self._prepare(prompts, sampling, seeds)
        return completions_of(self._answers(requests, version), sampling, self.tokenizer, version)

    def start(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> Ahead:
        """See `RolloutEngine.start`. What a lost server did not answer is generated by the weights of the time when the
        result is asked for: all of it, so that no group has two versions.

        Raises as `generate` does.
        """
        requests, version = self._prepare(prompts, sampling, seeds)
        fleet = self._connected()
        fleet.require(version, self.weights)
        answers: list[Answer | None] = [None] * len(requests)

        def finish(failure: BaseException | None) -> list[tuple[Completion, ...]]:
            if isinstance(failure, ServerGone):
                return self.generate(prompts, sampling, seeds)
            if failure is not None:
                raise failure
            return completions_of([one for one in answers if one is not None], sampling, self.tokenizer, version)

        work = _ask(fleet.clients, requests, range(len(requests)), answers)
        self._ahead = Ahead(fleet.loop.submit(timed(work)), finish)
        return self._ahead

    def settle(self) -> None:
        if self._ahead is not None:
            self._ahead.wait()

    def close(self) -> None:
        """Breaks off what is being generated, and ends the server that is the engine's own."""
        atexit.unregister(self.close)
        fleet, self.fleet, self._ahead = self.fleet, None, None
        if fleet is not None:
            fleet.close()

    def _connected(self) -> ServerFleet:
        if self.fleet is None:
            atexit.register(self.close)
            path, dtype = str(self.model.name_or_path), self.model.dtype
            self.fleet = ServerFleet(self.options, path, dtype, self.folder, self.ranks)
        return self.fleet

    def _prepare(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray) -> tuple[list[_Request], int]:
        """A request for every sample, and the version of the policy that will answer them."""
        fleet = self._connected()
        limit = fleet.limit
        check_request(prompts, sampling, seeds, limit, f"the server's {limit} tokens (max_model_len)")
        if fleet.version is None:
            # Nobody has pushed yet (a checkpoint is validated): the servers have the weights of the policy's files.
            self.push(self.weights(), 0)
        assert fleet.version is not None
        ends = end_token_ids(self.model, self.tokenizer)
        requests = [
            (number, {"prompt": list(prompt.token_ids), **request_fields(sampling, ends, seed)})
            # The ranks begin with different servers.
            for number, (prompt, drawn) in enumerate(zip(prompts, seeds, strict=True), start=self.ranks.rank)
            for seed in drawn
        ]
        return requests, fleet.version

    def _answers(self, requests: Sequence[_Request], version: int) -> list[Answer]:
        """Of every request; what a lost server did not answer is asked for again.

        A loss that one rank meets with is everybody's: the weights that follow are pushed by all.
        """
        fleet = self._connected()
        answers: list[Answer | None] = [None] * len(requests)
        while True:
            fleet.require(version, self.weights)
            missing = [index for index, answer in enumerate(answers) if answer is None]
            met = None
            try:
                fleet.loop.run(_ask(fleet.clients, requests, missing, answers))
            except ServerGone as gone:
                met = gone
            lost = loss_of_any(self.ranks, met, "completions of all ranks")
            if lost is None:
                break
            fleet.recover(lost, version, self.weights)
        fleet.succeeded()
        return [answer for answer in answers if answer is not None]


async def _ask(
    clients: Sequence[ServerClient],
    requests: Sequence[_Request],
    missing: Sequence[int],
    answers: list[Answer | None],
) -> None:
    """Fills in the missing answers, as many as can be had, and raises what kept the others away."""

    async def one(index: int) -> None:
        number, fields = requests[index]
        answers[index] = await clients[number % len(clients)].complete(fields)

    async def all_of_them() -> list[BaseException]:
        found = await asyncio.gather(*map(one, missing), return_exceptions=True)
        return [each for each in found if isinstance(each, BaseException)]

    (errors,) = await together(clients, [all_of_them()])
    # What asking again cannot cure comes first.
    for error in sorted(errors, key=lambda each: isinstance(each, ServerGone)):
        raise error
