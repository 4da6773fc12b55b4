"""Pushes the policy's weights to vLLM servers: the requests around a push, and the two ways to send the bytes.

vLLM 0.32's own weight transfer (`/start_weight_update` and the requests after it) is not used. It accepts a push that
lacks weights, and the version it reports is unrelated to the weights that the workers hold after a failed push. A
registered transfer engine could carry the bytes on a CPU, but would need the same code as here; and after its
finish had raised on an incomplete push, the next `start_weight_update` failed with "already active".
"""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch

from app.engines.requests import EngineError
from app.engines.server.client import ServerClient, gather_while_healthy
from app.engines.server.loop_thread import LoopThread
from app.engines.wire.chunks import TensorSpec, chunks, to_json
from app.engines.wire.group import WeightGroup, open_store
from app.engines.wire.shared_file import remove_abandoned, shared_chunk
from datamodules.errors import UserError

T = TypeVar("T")
Transport = Literal["auto", "shared_memory", "process_group"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WeightPusher:
    """Pushes weights to all servers at once, and verifies which version their workers hold.

    Args:
        loop: event loop of the clients.
        clients: one per server.
        transport: see `FleetOptions`.
        address: address of this machine as seen by the servers, for the process group.
        dtype: dtype that floating-point weights are sent in; None keeps the policy's.
        chunk_bytes: size of the chunks that weights are sent in.
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
        local = all(urlsplit(client.url).hostname in _LOOPBACK for client in clients)
        self.transport = ("shared_memory" if local else "process_group") if transport == "auto" else transport
        self._address, self._dtype, self._chunk_bytes = address, dtype, chunk_bytes
        self._group: WeightGroup | None = None
        if self.transport == "shared_memory":
            remove_abandoned()

    def push(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None = None) -> None:
        """Send the weights, and return when every worker generates with them and has no cache of earlier ones.

        After an error the servers stay paused, so that none of them generates with unknown weights.

        Args:
            named_tensors: consumed to the end unless an error occurs.
            version: the policy's version.
            since: version that every worker holds, and that tensors not given still have; None if all are given.

        Raises:
            EngineError: a server did not load the weights.
            LostServerError: a server does not answer.
        """
        if self.transport == "process_group" and self._group is None:
            self._group = self._form_group()
        self._all(client.pause() for client in self._clients)
        self._call("dots_begin", since=since)
        for chunk in chunks(named_tensors, self._dtype, self._chunk_bytes):
            self._send(chunk)
        self._call("dots_finish", version=version)
        if not all(self._all(client.reset_prefix_cache() for client in self._clients)):
            raise EngineError("A vLLM server could not reset its prefix cache after a push. See the server's log.")
        found = self.versions()
        if set(found) != {str(version)}:
            raise EngineError(
                f"After the push of version {version} the vLLM workers report {', '.join(found)}, so the weights did "
                "not arrive. See the server's log."
            )
        self._all(client.resume() for client in self._clients)

    def versions(self) -> list[str]:
        """Return the version that each worker holds; "None" for the weights that it was started with."""
        return self._call("dots_version")

    def _send(self, chunk: list[tuple[str, torch.Tensor]]) -> None:
        if self.transport == "process_group":
            assert self._group is not None
            specs = to_json([TensorSpec.of(name, tensor) for name, tensor in chunk])
            # The workers must receive while this process sends.
            receives = [client.call("dots_receive", specs=specs) for client in self._clients]
            receiving = self._loop.submit(gather_while_healthy(self._clients, receives))
            broadcast = self._group.send(chunk)
            # First the answers: the broadcast to a worker that failed would never end.
            receiving.result()
            broadcast.wait()
            return
        try:
            with shared_chunk(chunk) as (path, layout):
                self._call("dots_load_file", path=path, specs=to_json(layout))
        except OSError as error:
            size = sum(tensor.nbytes for _, tensor in chunk)
            raise UserError(
                f"The shared memory has no room for {size} bytes of weights ({error.strerror}). "
                "Lower engine.chunk_mib, enlarge the container's /dev/shm, or set engine.transport to process_group."
            ) from error

    def _form_group(self) -> WeightGroup:
        sizes = self._all(client.world_size() for client in self._clients)
        size = 1 + sum(sizes)
        store = open_store(self._address, size)
        where = {"address": self._address, "port": store.port, "size": size}
        joins = [
            client.call("dots_join", first_rank=1 + sum(sizes[:i]), **where) for i, client in enumerate(self._clients)
        ]
        joining = self._loop.submit(gather_while_healthy(self._clients, joins))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        group = WeightGroup(store, 0, size, device)
        joining.result()
        return group

    def _call(self, method: str, **arguments: object) -> list[str]:
        """Call a method of all servers' workers, and return every worker's result."""
        answers = self._all(client.call(method, **arguments) for client in self._clients)
        return [text for answer in answers for text in answer]

    def _all(self, work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        return self._loop.run(gather_while_healthy(self._clients, list(work)))
