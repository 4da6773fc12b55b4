"""One reload of the weights in vLLM's worker, of all weights or of those that changed. Runs only inside vLLM.

vLLM 0.32's own reload and weight transfer leave a tied output head unchanged on a CPU, and accept incomplete weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from app.engines.worker.weight_names import not_pushed

_VLLM_LOG = "vllm.model_executor.model_loader.reload.layerwise"


class Reload:
    """vLLM's `reload_weights` in three steps, of which the last checks that no weight is missing.

    The model must not generate between the constructor and `finish`, or after an error until the next whole reload.

    Args:
        worker: vLLM's worker.
        whole: True if all weights will be loaded; otherwise layers that receive nothing keep their weights.
    """

    def __init__(self, worker: Any, whole: bool) -> None:
        self._model, self._whole = worker.get_model(), whole
        self._model_config, self._vllm_config = worker.model_config, worker.vllm_config
        self._expected = {name for name, _ in self._model.named_parameters()}
        self._given: set[str] = set()
        self._loaded: set[str] | None = set()
        with set_current_vllm_config(self._vllm_config):
            initialize_layerwise_reload(self._model)

    def load(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Load some of the weights, under their names in the checkpoint."""

        def recorded() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in named_tensors:
                self._given.add(name)
                yield name, tensor

        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            loaded = self._model.load_weights(recorded())
        # Some models do not report what they loaded and return None.
        self._loaded = None if loaded is None or self._loaded is None else self._loaded | loaded

    def finish(self, unfilled: Mapping[str, int]) -> dict[str, int]:
        """Put the loaded weights into use.

        Args:
            unfilled: the result of the last whole reload.

        Returns:
            The number of loaded elements of each layer that has more elements (a vocabulary padded to whole blocks).

        Raises:
            ValueError: a weight of the model is missing, or a layer received only part of its weights.
        """
        found = {}
        for name, layer in self._model.named_modules():
            info = get_layerwise_info(layer)
            # A layer that has received everything is no longer part of the reload.
            if info.can_load() and 0 < info.load_numel < info.load_numel_total:
                found[name] = int(info.load_numel)
        self.end()
        if not self._whole:
            # vLLM replaces a merged layer as a whole: parts that were not pushed would be left without values.
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
        """End the reload, however much was loaded, so that another one can begin."""
        # vLLM warns about each layer that keeps its weights; `finish` reports missing weights itself.
        log = logging.getLogger(_VLLM_LOG)
        with set_current_vllm_config(self._vllm_config):
            before = log.level
            log.setLevel(logging.ERROR)
            finalize_layerwise_reload(self._model, self._model_config)
            log.setLevel(before)


def repack_heads(model: Any) -> None:
    """Repack tied output heads, which a reload on a CPU leaves unchanged.

    vLLM's CPU kernels multiply by a packed copy of a head's weight. A head that shares its weight with the embedding
    receives the new values through it, but keeps the old copy. On a GPU there is no copy, and nothing to do.
    """
    for module in model.modules():
        if isinstance(module, VocabParallelEmbedding) and isinstance(module.quant_method, UnquantizedEmbeddingMethod):
            module.quant_method.process_weights_after_loading(module)
