"""Gives servers the policy's weights: what is asked of them around a push, and the two ways that the bytes take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import torch

from app.engines.requests import EngineError
from app.engines.server.client import ServerClient, together
from app.engines.server.loop_thread import LoopThread
from app.engines.wire.chunks import TensorSpec, chunks, to_json
from app.engines.wire.group import Rendezvous, WeightGroup
from app.engines.wire.shared_file import shared_chunk
from datamodules.errors import UserError

Transport = Literal["auto", "shared_memory", "process_group"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WeightPusher:
    """Pushes weights to all servers at once; a server counts as having them when it says so.

    Args:
        loop: in which the clients live.
        clients: of the servers.
        transport: "shared_memory" for servers of this machine, "process_group" for others; "auto" decides by the urls.
        address: of this machine, as the servers reach it; for the process group.
        dtype: that floating-point weights are sent in; None keeps the policy's.
        chunk_bytes: sent at a time.
    """

    def __init__(
        self,
        loop: LoopThread,
        clients: Sequence[ServerClient],
        transport: Transport,
        address: str,
        dtype: torch.dtype | None,
        chunk_bytes: int,
    ) -> None:
        self._loop, self._clients = loop, clients
        near = all(urlsplit(client.url).hostname in _LOOPBACK for client in clients)
        self.transport = ("shared_memory" if near else "process_group") if transport == "auto" else transport
        self._address, self._dtype, self._chunk_bytes = address, dtype, chunk_bytes
        self._group: WeightGroup | None = None

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Returns when every worker of every server generates with the weights, and remembers nothing of those before.

        After an error the servers stay paused: none of them generates with weights that nobody knows.

        Args:
            named_tensors: consumed to the end, but for errors.
            version: of the policy.
            since: version that every worker has the other weights of; None when all weights are given.

        Raises:
            EngineError: a server did not take the weights.
            ServerGone: a server does not answer.
        """
        if self.transport == "process_group" and self._group is None:
            self._group = self._form_group()
        self._all(client.pause() for client in self._clients)
        self._call("dots_begin", since=since)
        for chunk in chunks(named_tensors, self._dtype, self._chunk_bytes):
            self._send(chunk)
        self._call("dots_finish", version=version)
        if not all(self._all(client.reset_prefix_cache() for client in self._clients)):
            raise EngineError("a vLLM server could not reset its prefix cache after a push: see its log")
        self.check(version)
        self._all(client.resume() for client in self._clients)

    def versions(self) -> list[str]:
        """What every worker says that it generates with; "None" for the weights that it was started with."""
        return self._call("dots_version")

    def check(self, version: int) -> None:
        """Raises EngineError when a worker does not have the version."""
        found = self.versions()
        if set(found) != {str(version)}:
            raise EngineError(
                f"after the push of version {version} the vLLM workers report {', '.join(found)}: "
                "the weights did not arrive; see the server's log"
            )

    def _send(self, chunk: list[tuple[str, torch.Tensor]]) -> None:
        if self.transport == "process_group":
            self._broadcast(chunk)
            return
        try:
            with shared_chunk(chunk) as (path, specs):
                self._call("dots_load_file", path=path, specs=to_json(specs))
        except OSError as error:
            size = sum(tensor.nbytes for _, tensor in chunk)
            raise UserError(
                f"no room for {size} bytes of weights in shared memory ({error.strerror}): lower engine.chunk_mib, "
                "give the container a larger /dev/shm, or set engine.transport to process_group"
            ) from error

    def _broadcast(self, chunk: list[tuple[str, torch.Tensor]]) -> None:
        assert self._group is not None
        specs = to_json([TensorSpec.of(name, tensor) for name, tensor in chunk])
        # The workers must be receiving while this process sends.
        asked = self._loop.submit(
            self._together([client.call("dots_receive", specs=specs) for client in self._clients])
        )
        work = self._group.send(chunk)
        # A server that fails never receives, and nothing would end the broadcast.
        asked.result()
        work.wait()

    def _form_group(self) -> WeightGroup:
        sizes = self._all(client.world_size() for client in self._clients)
        meeting = Rendezvous(self._address)
        size = 1 + sum(sizes)
        store = meeting.open(size)
        joins = [
            client.call("dots_join", address=self._address, port=meeting.port, first_rank=1 + sum(sizes[:i]), size=size)
            for i, client in enumerate(self._clients)
        ]
        asked = self._loop.submit(self._together(joins))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        group = WeightGroup(store, 0, size, device)
        asked.result()
        return group

    def _call(self, method: str, **arguments: object) -> list[str]:
        answers = self._all(client.call(method, **arguments) for client in self._clients)
        return [text for answer in answers for text in answer]

    def _all(self, work: Iterable[Any]) -> list[Any]:
        return self._loop.run(self._together(list(work)))

    async def _together(self, work: Sequence[Any]) -> list[Any]:
        return await together(self._clients, work)
