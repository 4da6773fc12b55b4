"""Inside a vLLM server's worker: takes the policy's weights chunk by chunk. Imported by vLLM, not by us."""

from __future__ import annotations

from typing import Any

import torch

from app.engines.wire.chunks import from_json
from app.engines.wire.group import WeightGroup, join
from app.engines.wire.shared_file import read_chunk
from app.engines.worker.extension import PolicyWeights
from app.engines.worker.reload import Reload


class ServedWeights(PolicyWeights):
    """`PolicyWeights` for a trainer in another process. All arguments are text, as the HTTP interface hands them on.

    Each chunk can be freed before the next is sent. Whoever calls these methods pauses generation first.
    """

    _dots_begun: Reload | None = None
    _dots_group: WeightGroup | None = None

    def dots_begin(self: Any, since: str) -> None:
        """From here to `dots_finish` the model is not fit to generate, and has no version.

        Args:
            since: version whose weights the tensors that do not come have; "None" when all come.
        """
        if self._dots_begun is not None:
            # What an earlier push left behind when it broke off.
            self._dots_begun.end()
        self._dots_begun = None
        self._dots_begun = self._dots_reload(None if since == "None" else int(since))

    def dots_load_file(self: Any, path: str, specs: str) -> None:
        """Loads a chunk out of shared memory."""
        self._dots_take(read_chunk(path, from_json(specs)))

    def dots_join(self: Any, address: str, port: str, first_rank: str, size: str) -> None:
        """Joins the trainer's process group, as the worker's rank counted from `first_rank`."""
        self._dots_group = None
        store = join(address, int(port), int(size))
        self._dots_group = WeightGroup(store, int(first_rank) + self.rank, int(size), torch.device(self.device))

    def dots_receive(self: Any, specs: str) -> None:
        """Loads a chunk that the trainer broadcasts."""
        self._dots_take(self._dots_group.receive(from_json(specs)))

    def _dots_take(self: Any, named_tensors: list[tuple[str, torch.Tensor]]) -> None:
        if self._dots_begun is None:
            raise RuntimeError("weights came without dots_begin")
        self._dots_begun.take(named_tensors)

    def dots_finish(self: Any, version: str) -> None:
        """Makes what was loaded the weights that generate, under `version`.

        Raises ValueError when a weight of the model did not come.
        """
        if self._dots_begun is None:
            raise RuntimeError("a push ended without dots_begin")
        reload, self._dots_begun = self._dots_begun, None
        self._dots_take_over(reload, int(version))
