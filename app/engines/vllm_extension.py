"""Inside vLLM's worker: takes the policy's weights by name. Imported by vLLM (`worker_extension_cls`), not by us."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


class PolicyWeights:
    """Mixed into vLLM's worker; its methods are called through `collective_rpc`.

    The prefix cache belongs to the scheduler, out of a worker's reach: whoever loads weights resets it afterwards, or
    keys and values of the old policy serve the new one.
    """

    # vLLM refuses an extension that redefines a name of its worker: hence the prefix.
    _dots_version: int | None = None

    def dots_load(self: Any, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Makes the engine's weights those given: what the worker's `reload_weights` does, with its warning an error.

        Args:
            named_tensors: every tensor of the checkpoint, under its name there.
            version: read back by `dots_version`; while loading, and after a load that failed, that is None.

        Raises:
            ValueError: a weight of the model was not among the tensors, or a tensor belongs nowhere.
        """
        self._dots_version = None
        model = self.get_model()
        expected = {name for name, _ in model.named_parameters()}
        with set_current_vllm_config(self.vllm_config):
            initialize_layerwise_reload(model)
            try:
                loaded = model.load_weights(iter(named_tensors))
            finally:
                # Also after a failure: a later load starts from a whole model.
                finalize_layerwise_reload(model, self.model_config)
        require_all(expected, loaded)
        repack_heads(model)
        self.model_runner.reset_lora_state()
        self._dots_version = version

    def dots_version(self) -> int | None:
        """The version of the weights that would generate now."""
        return self._dots_version


def require_all(expected: set[str], loaded: set[str] | None) -> None:
    """Raises ValueError when a push left a weight as it was (`loaded` is None for models that do not say)."""
    if loaded is not None and (missing := sorted(expected - loaded)):
        raise ValueError(f"{len(missing)} weights were not pushed, {missing[0]} among them")


def repack_heads(model: Any) -> None:
    """Packs tied output heads anew, which a reload on a CPU leaves as they were.

    vLLM's CPU kernels multiply by a packed copy of a head's weight. A head that shares its weight with the embedding
    gets the new values through it, but keeps the old copy.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)
