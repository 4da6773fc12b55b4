"""Inside vLLM's worker: one reload of the model's weights, of all or of those that changed. Not imported by us."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from app.engines.worker.weight_names import not_pushed

_VLLM_LOG = "vllm.model_executor.model_loader.reload.layerwise"


class Reload:
    """What vLLM's `reload_weights` does, in three parts and with an end that knows what is missing.

    Between the first part and `finish`, and after an error until a later whole reload, the model must not generate.

    Args:
        worker: vLLM's.
        whole: all weights come; else the layers that get nothing keep what they have.
    """

    def __init__(self, worker: Any, whole: bool) -> None:
        self._model, self._whole = worker.get_model(), whole
        self._model_config, self._vllm_config = worker.model_config, worker.vllm_config
        self._expected = {name for name, _ in self._model.named_parameters()}
        self._given: set[str] = set()
        self._loaded: set[str] | None = set()
        with set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._model)

    def take(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Loads some of the weights, under their names in the checkpoint."""
        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            loaded = self._model.load_weights(self._noted(named_tensors))
        # None comes from models that do not say.
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded

    def finish(self, unfilled: Mapping[str, int]) -> dict[str, int]:
        """Makes what was loaded the weights that generate.

        Args:
            unfilled: what the last whole reload returned.

        Returns:
            Elements loaded of each layer that has more of them (a vocabulary padded to whole blocks).

        Raises:
            ValueError: a weight of the model did not come, or a layer got a part of its weights.
        """
        found = self._unfilled()
        self.end()
        if not self._whole:
            # What vLLM merges into one layer is replaced together: the rest of it would be left without values.
            if partial := [name for name, size in found.items() if unfilled.get(name) != size]:
                raise ValueError(f"{partial[0]} was pushed in part")
            found = dict(unfilled)
        elif self._loaded is not None:
            packed = getattr(self._model, "packed_modules_mapping", {})
            if missing := sorted(not_pushed(self._expected, self._loaded, self._given, packed)):
                raise ValueError(f"{len(missing)} weights were not pushed, {missing[0]} among them")
        repack_heads(self._model)
        return found

    def end(self) -> None:
        """Leaves a model that a later reload can start from, whatever was loaded."""
        # A layer that keeps its weights is a warning each; what is missing is told above.
        log = logging.getLogger(_VLLM_LOG)
        with set_current_vllm_config(self._vllm_config):
            before = log.level
            log.setLevel(logging.ERROR)
            finalize_layerwise_reload(self._model, self._model_config)
            log.setLevel(before)

    def _noted(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in named_tensors:
            self._given.add(name)
            yield name, tensor

    def _unfilled(self) -> dict[str, int]:
        found = {}
        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            # A layer that has got everything is out of the reload already.
            if info.can_load() and 0 < info.load_numel < info.load_numel_total:
                found[name] = int(info.load_numel)
        return found


def repack_heads(model: Any) -> None:
    """Packs tied output heads anew, which a reload on a CPU leaves as they were.

    vLLM's CPU kernels multiply by a packed copy of a head's weight. A head that shares its weight with the embedding
    gets the new values through it, but keeps the old copy.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.numel():
            module.quant_method.process_weights_after_loading(module)
