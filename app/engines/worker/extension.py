"""Extensions of vLLM's worker that load the policy's weights by name. vLLM imports them (`worker_extension_cls`)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from app.engines.wire import cuda_ipc
from app.engines.wire.chunks import from_json
from app.engines.wire.group import WeightGroup, join
from app.engines.wire.shared_file import read_chunk
from app.engines.worker.reload import Reload


class PolicyWeights:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`.

    The prefix cache belongs to the scheduler, which a worker cannot reach. Callers must reset it after loading weights,
    or keys and values of the old policy would be used with the new one.
    """

    # Provided by vLLM's worker.
    rank: int
    device: torch.device
    model_runner: Any

    # vLLM rejects an extension that redefines a name of its worker: hence the prefix.
    _dots_version: int | None = None
    _dots_unfilled: Mapping[str, int] = {}

    def dots_load(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None) -> None:
        """Load tensors under their names in the checkpoint. During a load and after a failed one there is no version.

        Tensors that are not given still have the version `since`; None if all are given.

        Raises:
            ValueError: a weight of the model is missing, a tensor has no place in the model, or the worker does not
                hold the weights of `since`.
        """
        reload = self._dots_begin_reload(since)
        try:
            reload.load(named_tensors)
        except BaseException:
            # Leave a whole model for the next load to start from.
            reload.end()
            raise
        self._dots_finish_reload(reload, version)

    def dots_version(self) -> int | None:
        """Return the version of the weights that the worker would generate with."""
        return self._dots_version

    def _dots_begin_reload(self, since: int | None) -> Reload:
        """Begin a reload. There is no version until `_dots_finish_reload`."""
        if since is not None and self._dots_version != since:
            raise ValueError(
                f"a worker that holds version {self._dots_version} received only the changes since version {since}"
            )
        self._dots_version = None
        return Reload(self, whole=since is None)

    def _dots_finish_reload(self, reload: Reload, version: int) -> None:
        self._dots_unfilled = reload.finish(self._dots_unfilled)
        self.model_runner.reset_lora_state()
        self._dots_version = version


class ServedPolicyWeights(PolicyWeights):
    """`PolicyWeights` in a server, for a trainer in another process that sends the weights in chunks.

    All arguments are text, as the HTTP interface passes them on. Each chunk can be freed before the next is sent.
    Callers must pause generation first.
    """

    _dots_reload: Reload | None = None
    _dots_group: WeightGroup | None = None
    _dots_buffer: torch.Tensor | None = None

    def dots_facts(self) -> str:
        """Return the UUID of the worker's GPU ("" for a CPU) and the dtype of its weights, as JSON."""
        dtype = str(self.model_runner.model_config.dtype).removeprefix("torch.")
        return json.dumps({"gpu": cuda_ipc.name_of_gpu(torch.device(self.device)), "dtype": dtype})

    def dots_begin(self, since: str) -> None:
        """Begin a push. Until `dots_finish` the model must not generate and has no version."""
        if self._dots_reload is not None:
            # An earlier push was interrupted.
            self._dots_reload.end()
        self._dots_reload = None
        self._dots_reload = self._dots_begin_reload(None if since == "None" else int(since))

    def dots_load_file(self, path: str, specs: str) -> None:
        """Load a chunk from shared memory."""
        self._dots_load_chunk(read_chunk(path, from_json(specs)))

    def dots_join(self, address: str, port: str, first_rank: str, size: str) -> None:
        """Join the trainer's process group; `first_rank` is the rank of this server's first worker."""
        self._dots_group = None
        store = join(address, int(port), int(size))
        self._dots_group = WeightGroup(store, int(first_rank) + self.rank, int(size), torch.device(self.device))

    def dots_receive(self, specs: str) -> None:
        """Load a chunk that the trainer broadcasts."""
        if self._dots_group is None:
            raise RuntimeError("dots_receive was called before dots_join")
        self._dots_load_chunk(self._dots_group.receive(from_json(specs)))

    def dots_map(self, handles: str) -> None:
        """Map the buffer that the trainer has made on this worker's GPU, in place of an earlier one."""
        self._dots_buffer = None
        self._dots_buffer = cuda_ipc.map_buffer(handles, torch.device(self.device))

    def dots_read(self, specs: str) -> None:
        """Load the chunk that is in the mapped buffer."""
        if self._dots_buffer is None:
            raise RuntimeError("dots_read was called before dots_map")
        self._dots_load_chunk(cuda_ipc.read_chunk(self._dots_buffer, from_json(specs)))

    def _dots_load_chunk(self, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        if self._dots_reload is None:
            raise RuntimeError("a chunk of weights arrived before dots_begin")
        self._dots_reload.load(named_tensors)

    def dots_finish(self, version: str) -> None:
        """Generate with the loaded weights from now on. Raises ValueError if a weight of the model is missing."""
        if self._dots_reload is None:
            raise RuntimeError("dots_finish was called before dots_begin")
        reload, self._dots_reload = self._dots_reload, None
        self._dots_finish_reload(reload, int(version))
