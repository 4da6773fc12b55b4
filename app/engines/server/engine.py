"""Rollouts by vLLM servers, which are separate processes on this machine or on others."""

from __future__ import annotations

import asyncio
import atexit
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
import torch

from app.engines.ahead import Ahead, Groups, timed
from app.engines.base import RolloutEngine, Sampling, check_request, end_token_ids, limits_of
from app.engines.requests import Answer, completions_of, request_fields, vocabulary_of
from app.engines.server.client import LostServerError, ServerClient, gather_while_healthy
from app.engines.server.fleet import ServerFleet, ask_running
from app.engines.server.options import FleetOptions
from app.engines.server.rank_zero import lost_server_of_any_rank
from app.engines.turns import Conversations, TurnRequest
from datamodules.types import Prompt

_POLL_S = 0.002
"""Seconds between two looks at what the environment has answered."""


@dataclass(frozen=True, slots=True)
class _Request:
    """A request for one sample.

    Attributes:
        prompt: index of its prompt, whose samples one server generates.
        token_ids: of the prompt.
        settings: see `request_fields`.
    """

    prompt: int
    token_ids: tuple[int, ...]
    settings: dict[str, object]


@dataclass(eq=False)
class VllmServer(FleetOptions, RolloutEngine):
    """Generates with vLLM over HTTP, with token ids as input and output.

    Without `url` it starts servers at the beginning of the run (their output goes to `server.log`, `server_1.log`, ...
    in the run's folder) and ends them with the run: one, or one for each group of `server.devices`. With `url` it uses
    running servers, started with `dots serve`. A prompt goes to the server with the fewest requests; all its
    completions come from there, so that the prefix cache reads the prompt once. They depend on their seeds, not on the
    server.

    If a server is lost, the run reports it in one line, restarts it (or waits until its owner does), pushes the
    weights, and requests only the missing completions again.

    With several trainer processes, rank 0 starts or joins the servers and sends them the weights; every process
    requests its own share of the completions. Processes on other machines need a `server.host` that they can reach.

    It can generate one step's rollouts while another step trains (`callbacks.RolloutAhead`).
    """

    runs_ahead = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fleet: ServerFleet | None = None
        self._ahead: Ahead | None = None
        self._limit: int | None = None

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """See `RolloutEngine.push`. A server that is lost meanwhile is replaced and receives the current weights."""
        self.settle()
        fleet = self._connected()
        try:
            if since is not None and not fleet.holds(since):
                named_tensors, since = self.weights(), None
            fleet.push(named_tensors, version, since)
        except LostServerError as lost:
            fleet.recover(lost, version, self.weights)
        fleet.succeeded()

    def context_length(self, positions: int | None) -> int | None:
        """See `RolloutEngine.context_length`. Servers that are given by URLs are asked, once, and must be running."""
        if not self.urls:
            return self.server.context_length(positions)
        if self._limit is None:
            self._limit = min(ask_running(self, ServerClient.max_model_len))
        return min(self._limit, positions or self._limit)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Groups:
        if len(prompts) == 0 and self.ranks.size == 1:
            return []
        requests, version = self._prepare(prompts, sampling, seeds, limits)
        answers: list[Answer | None] = [None] * len(requests)
        self._request(requests, answers, version)
        return self._completions(answers, sampling, version)

    def start(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None = None
    ) -> Ahead:
        """See `RolloutEngine.start`. Raises like `generate`.

        If a server is lost, the missing completions are generated again when the result is requested, with the weights
        of that time, whose version they carry. With several ranks the call and the request for its result are
        collective.
        """
        requests, version = self._prepare(prompts, sampling, seeds, limits)
        fleet = self._connected()
        fleet.require(version, self.weights)
        answers: list[Answer | None] = [None] * len(requests)

        def finish(failure: BaseException | None) -> Groups:
            mine = failure if isinstance(failure, LostServerError) else None
            if failure is not None and mine is None:
                raise failure
            missing = [index for index, answer in enumerate(answers) if answer is None]
            now = version
            if lost_server_of_any_rank(self.ranks, mine, "completions generated ahead") is not None:
                assert fleet.version is not None
                now = fleet.version
                self._request(requests, answers, now)
            groups = self._completions(answers, sampling, version)
            if now == version:
                return groups
            again, size = set(missing), sampling.num_generations
            return [
                tuple(
                    replace(one, policy_version=now) if number * size + sample in again else one
                    for sample, one in enumerate(group)
                )
                for number, group in enumerate(groups)
            ]

        work = _request_missing(fleet.clients, requests, range(len(requests)), answers)
        self._ahead = Ahead(fleet.loop.submit(timed(work)), finish)
        return self._ahead

    def converse(self, conversations: Conversations, sampling: Sampling) -> None:
        """See `RolloutEngine.converse`. Every conversation continues when the environment answers.

        All turns of a conversation go to one server, whose prefix cache keeps what it has read. If a server is lost,
        only the turns that are missing are generated again.
        """
        fleet = self._connected()
        if fleet.version is None:
            self.push(self.weights(), 0)
        assert fleet.version is not None
        version, ends = fleet.version, end_token_ids(self.model, self.tokenizer)
        vocabulary = vocabulary_of(self.model)
        missing = {request.conversation: request for request in conversations.begin()}

        def ended(number: int, answer: Answer) -> None:
            del missing[number]
            [(turn,)] = completions_of([answer], sampling, self.tokenizer, version, vocabulary)
            conversations.ended(number, turn)

        async def take_turns() -> None:
            # A server that is lost takes the states of its conversations with it.
            table = _Table(fleet.clients, lambda one: request_fields(sampling, ends, one.seed, one.limit))
            await gather_while_healthy(fleet.clients, [table.serve(conversations, missing, ended)])

        while True:
            fleet.require(version, self.weights)
            mine = None
            try:
                fleet.loop.run(take_turns())
            except LostServerError as error:
                mine = error
            lost = lost_server_of_any_rank(self.ranks, mine, "conversations of all ranks")
            if lost is None:
                break
            fleet.recover(lost, version, self.weights)
        fleet.succeeded()

    def _request(self, requests: Sequence[_Request], answers: list[Answer | None], version: int) -> None:
        """Fill in all missing answers by the policy of a version, whatever servers are lost. Collective."""
        fleet = self._connected()
        while True:
            fleet.require(version, self.weights)
            missing = [index for index, answer in enumerate(answers) if answer is None]
            mine = None
            try:
                fleet.loop.run(_request_missing(fleet.clients, requests, missing, answers))
            except LostServerError as error:
                mine = error
            # A loss on one rank concerns all: they all push the weights afterwards.
            lost = lost_server_of_any_rank(self.ranks, mine, "completions of all ranks")
            if lost is None:
                break
            fleet.recover(lost, version, self.weights)
        fleet.succeeded()

    def _completions(self, answers: Sequence[Answer | None], sampling: Sampling, version: int) -> Groups:
        found = [answer for answer in answers if answer is not None]
        return completions_of(found, sampling, self.tokenizer, version, vocabulary_of(self.model))

    def settle(self) -> None:
        if self._ahead is not None:
            self._ahead.wait()

    def close(self) -> None:
        """Cancel running requests and end the engine's own servers."""
        atexit.unregister(self.close)
        fleet, self.fleet, self._ahead = self.fleet, None, None
        if fleet is not None:
            fleet.close()

    def _connected(self) -> ServerFleet:
        if self.fleet is None:
            atexit.register(self.close)
            path, dtype = str(self.model.name_or_path), self.policy_dtype
            self.fleet = ServerFleet(self, path, dtype, self.folder, self.ranks, self.model.device)
        return self.fleet

    def _prepare(
        self, prompts: Sequence[Prompt], sampling: Sampling, seeds: np.ndarray, limits: np.ndarray | None
    ) -> tuple[list[_Request], int]:
        """Return a request for every sample, and the version of the policy that will answer them."""
        fleet = self._connected()
        limit = fleet.limit
        check_request(prompts, sampling, seeds, limit, f"the server's {limit} tokens (max_model_len)", limits)
        if fleet.version is None:
            # Without a push (e.g. when a checkpoint is validated) the servers have the weights of the policy's folder.
            self.push(self.weights(), 0)
        assert fleet.version is not None
        ends = end_token_ids(self.model, self.tokenizer)
        allowed = limits_of(sampling, seeds, limits)
        numbers: dict[tuple[str, tuple[int, ...]], int] = {}  # the samples of a prompt may come one by one
        requests = [
            _Request(
                numbers.setdefault((prompt.id, prompt.token_ids), len(numbers)),
                prompt.token_ids,
                request_fields(sampling, ends, seed, limit),
            )
            for prompt, drawn, its in zip(prompts, seeds, allowed, strict=True)
            for seed, limit in zip(drawn, its, strict=True)
        ]
        return requests, fleet.version


class _Table:
    """Conversations that servers take the policy's turns of.

    Args:
        clients: the servers.
        settings: returns those of a turn; see `request_fields`.
    """

    def __init__(self, clients: Sequence[ServerClient], settings: Callable[[TurnRequest], dict[str, object]]) -> None:
        self._clients, self._settings = clients, settings
        self._server_of: dict[object, int] = {}
        """The server of each prompt, whose completions share what it has read."""
        self._loads = [0] * len(clients)
        self._room = [asyncio.Semaphore(client.concurrency) for client in clients]

    async def serve(
        self,
        conversations: Conversations,
        missing: dict[int, TurnRequest],
        ended: Callable[[int, Answer], None],
    ) -> None:
        """Take all turns, those that are `missing` first, until the conversations have ended."""
        running: set[asyncio.Task[tuple[int, Answer]]] = set()
        started: set[int] = set()
        try:
            while True:
                for number, request in missing.items():
                    if number not in started:
                        started.add(number)
                        running.add(asyncio.create_task(self._turn(request)))
                if not running and not conversations.outstanding:
                    return
                done: set[asyncio.Task[tuple[int, Answer]]] = set()
                if running:
                    timeout = _POLL_S if conversations.outstanding else None
                    done, running = await asyncio.wait(running, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                else:
                    since = time.perf_counter()
                    await asyncio.sleep(_POLL_S)
                    conversations.waited += time.perf_counter() - since
                for task in sorted(done, key=_failed):  # what has arrived is kept, whatever else is lost
                    number, answer = task.result()
                    started.discard(number)
                    ended(number, answer)
                missing |= {one.conversation: one for one in conversations.next(wait=False)}
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _turn(self, request: TurnRequest) -> tuple[int, Answer]:
        loads = self._loads
        server = self._server_of.setdefault(request.prompt.id, min(range(len(loads)), key=loads.__getitem__))
        loads[server] += 1
        try:
            async with self._room[server]:
                client = self._clients[server]
                return request.conversation, await client.complete(request.prompt.token_ids, self._settings(request))
        finally:
            loads[server] -= 1


def _failed(task: asyncio.Task[tuple[int, Answer]]) -> bool:
    return task.exception() is not None


async def _request_missing(
    clients: Sequence[ServerClient], requests: Sequence[_Request], missing: Sequence[int], answers: list[Answer | None]
) -> None:
    """Fill in as many missing answers as possible, then raise the error that prevented the others, if any.

    The next prompt is sent to the server with the fewest requests as soon as that has room for one more.
    """
    loads = [0] * len(clients)
    has_room = asyncio.Event()

    async def request_one(index: int, server: int) -> None:
        try:
            answers[index] = await clients[server].complete(requests[index].token_ids, requests[index].settings)
        finally:
            loads[server] -= 1
            has_room.set()

    async def request_all() -> list[BaseException]:
        sent: list[asyncio.Task[None]] = []
        try:
            for _, samples in groupby(missing, key=lambda index: requests[index].prompt):
                while loads[server := min(range(len(clients)), key=loads.__getitem__)] >= clients[server].concurrency:
                    has_room.clear()
                    await has_room.wait()
                for index in samples:
                    loads[server] += 1
                    sent.append(asyncio.create_task(request_one(index, server)))
            found = await asyncio.gather(*sent, return_exceptions=True)
        finally:
            for task in sent:
                task.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
        return [each for each in found if isinstance(each, BaseException)]

    (errors,) = await gather_while_healthy(clients, [request_all()])
    # Errors that a repeated request cannot resolve come first.
    for error in sorted(errors, key=lambda each: isinstance(each, LostServerError)):
        raise error
