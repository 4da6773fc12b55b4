"""Pushes the policy's weights to vLLM servers: the requests around a push, and the ways to send the bytes.

vLLM 0.32's own weight transfer (`/start_weight_update` and the requests after it) is not used. It accepts a push that
lacks weights, and the version it reports is unrelated to the weights that the workers hold after a failed push. A
registered transfer engine could carry the bytes on a CPU, but would need the same code as here; and after its
finish had raised on an incomplete push, the next `start_weight_update` failed with "already active". Its CUDA IPC
unpickles handles that arrive by HTTP and reaches servers on the trainer's own GPU only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch

from app.engines.requests import EngineError
from app.engines.server.client import ServerClient, gather_while_healthy
from app.engines.server.loop_thread import LoopThread
from app.engines.wire.chunks import TensorSpec, chunks, layout, to_json
from app.engines.wire.cuda_ipc import MappedBuffers, visible_gpus
from app.engines.wire.group import WeightGroup, open_store
from app.engines.wire.shared_file import remove_abandoned, shared_chunk
from datamodules.errors import UserError

T = TypeVar("T")
Transport = Literal["auto", "cuda_ipc", "shared_memory", "process_group"]

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class WeightPusher:
    """Pushes weights to all servers at once, and verifies which version their workers hold.

    Args:
        loop: event loop of the clients.
        clients: one per server.
        transport: see `FleetOptions`.
        address: address of this machine as seen by the servers, for the process group.
        chunk_bytes: size of the chunks that weights are sent in.
    """

    def __init__(
        self,
        loop: LoopThread,
        clients: Sequence[ServerClient],
        transport: Transport,
        address: str,
        chunk_bytes: int,
    ) -> None:
        self._loop, self._clients = loop, clients
        self._transport, self._address, self._chunk_bytes = transport, address, chunk_bytes
        self._dtype: torch.dtype | None = None
        self._group: WeightGroup | None = None
        self._gpus: dict[str, torch.device] = {}
        self._buffers: MappedBuffers | None = None
        self.transport: Transport | None = None
        """How weights are sent, once a push has begun."""

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
        if self.transport is None:
            self._choose_transport()
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
        if self.transport == "cuda_ipc":
            _, size = layout([TensorSpec.of(name, tensor) for name, tensor in chunk])
            if self._buffers is None or self._buffers.size < size:
                self._map(size)
            assert self._buffers is not None
            self._call("dots_read", specs=to_json(self._buffers.write(chunk)))
            return
        try:
            with shared_chunk(chunk) as (path, contents):
                self._call("dots_load_file", path=path, specs=to_json(contents))
        except OSError as error:
            size = sum(tensor.nbytes for _, tensor in chunk)
            raise UserError(
                f"The shared memory has no room for {size} bytes of weights ({error.strerror}). "
                "Lower engine.chunk_mib, enlarge the container's /dev/shm, or set engine.transport to process_group."
            ) from error

    def _choose_transport(self) -> None:
        """Decide how weights are sent, by where the servers are and the GPUs of their workers, and prepare it."""
        facts = [json.loads(text) for text in self._call("dots_facts")]
        dtypes = {fact["dtype"] for fact in facts}
        # Workers round to their dtype what arrives in another one, as the trainer would.
        self._dtype = getattr(torch, dtypes.pop()) if len(dtypes) == 1 else None
        visible = visible_gpus() if all(fact["gpu"] for fact in facts) else {}
        self._gpus = {fact["gpu"]: visible[fact["gpu"]] for fact in facts if fact["gpu"] in visible}
        local = all(urlsplit(client.url).hostname in _LOOPBACK for client in self._clients)
        mappable = local and all(fact["gpu"] in visible for fact in facts)
        chosen = self._transport
        if chosen == "auto":
            chosen = "cuda_ipc" if mappable else "shared_memory" if local else "process_group"
        if chosen == "cuda_ipc":
            if not mappable:
                raise UserError(
                    "engine.transport is cuda_ipc, but not every server runs on this machine and on a GPU that the "
                    "trainer sees. Set it to auto."
                )
            try:
                self._map(self._chunk_bytes)
            except (EngineError, RuntimeError) as error:
                if self._transport == "cuda_ipc":
                    raise EngineError(
                        f"CUDA IPC does not work here ({error}). Set engine.transport to auto."
                    ) from error
                print(f"dots: weights go through shared memory, since CUDA IPC failed ({error})", file=sys.stderr)
                self._buffers, chosen = None, "shared_memory"
        if chosen == "process_group":
            self._group = self._form_group()
        if chosen == "shared_memory":
            remove_abandoned()
        self.transport = chosen

    def _map(self, size: int) -> None:
        """Make a buffer on each worker's GPU and have the worker map it."""
        self._buffers = MappedBuffers(self._gpus, size)
        self._call("dots_map", handles=self._buffers.handles())

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
