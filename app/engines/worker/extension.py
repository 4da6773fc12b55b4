"""Inside vLLM's worker: takes the policy's weights by name. Imported by vLLM (`worker_extension_cls`), not by us."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from app.engines.worker.reload import Reload


class PolicyWeights:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`.

    The prefix cache belongs to the scheduler, out of a worker's reach: whoever loads weights resets it afterwards, or
    keys and values of the old policy serve the new one.
    """

    # vLLM refuses an extension that redefines a name of its worker: hence the prefix.
    _dots_version: int | None = None
    _dots_unfilled: Mapping[str, int] = {}

    def dots_load(
        self: Any, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int, since: int | None
    ) -> None:
        """Makes the engine's weights those given.

        Args:
            named_tensors: tensors of the checkpoint, under their names there.
            version: read back by `dots_version`; while loading, and after a load that failed, that is None.
            since: version whose weights the tensors that are not given have; None when all are given.

        Raises:
            ValueError: a weight of the model was not among the tensors, a tensor belongs nowhere, or the worker does
                not have the weights of `since`.
        """
        reload = self._dots_reload(since)
        try:
            reload.take(named_tensors)
        except BaseException:
            # A later load starts from a whole model.
            reload.end()
            raise
        self._dots_take_over(reload, version)

    def dots_version(self) -> int | None:
        """The version of the weights that would generate now."""
        return self._dots_version

    def _dots_reload(self: Any, since: int | None) -> Reload:
        """Begins; from here to `_dots_take_over` there is no version."""
        if since is not None and self._dots_version != since:
            raise ValueError(f"weights changed since version {since} came to a worker of version {self._dots_version}")
        self._dots_version = None
        return Reload(self, whole=since is None)

    def _dots_take_over(self: Any, reload: Reload, version: int) -> None:
        self._dots_unfilled = reload.finish(self._dots_unfilled)
        self.model_runner.reset_lora_state()
        self._dots_version = version
