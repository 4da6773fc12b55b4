"""Inside vLLM's worker: takes the policy's weights by name. Imported by vLLM (`worker_extension_cls`), not by us."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class PolicyWeights:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`.

    The prefix cache belongs to the scheduler, out of a worker's reach: whoever loads weights resets it afterwards, or
    keys and values of the old policy serve the new one.
    """

    # vLLM refuses an extension that redefines a name of its worker: hence the prefix.
    _dots_version: int | None = None

    def dots_load(self: Any, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> int:
        """Makes the engine's weights those given, and returns `version` once they are.

        Args:
            named_tensors: every tensor of the checkpoint, under its name there; consumed one by one, so tensors that
                exist only while they are iterated (merged adapters) need no copy.
            version: read back by `dots_version`; while loading, and after a load that failed, that is None.
        """
        self._dots_version = None
        self.reload_weights(weights_iterator=iter(named_tensors))
        repack_heads(self.get_model())
        self._dots_version = version
        return version

    def dots_version(self) -> int | None:
        """The version of the weights that would generate now."""
        return self._dots_version


def repack_heads(model: torch.nn.Module) -> None:
    """Packs tied output heads anew, which a reload on a CPU leaves as they were.

    vLLM's CPU kernels multiply by a packed copy of a head's weight. A head that shares its weight with the embedding
    gets the new values through it, but keeps the old copy.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)
