"""Inside a vLLM server's worker: takes the policy's weights chunk by chunk. Imported by vLLM, not by us."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from app.engines.shared_file import read_chunk
from app.engines.vllm_extension import PolicyWeights, repack_heads, require_all
from app.engines.weight_chunks import from_json
from app.engines.weight_group import WeightGroup, join


class ServedWeights(PolicyWeights):
    """`PolicyWeights` for a trainer in another process. All arguments are text, as the HTTP interface hands them on.

    vLLM's `reload_weights` wants all tensors in one call; these are its three parts, so that each chunk can be freed
    before the next is sent. Whoever calls them pauses generation first.
    """

    _dots_loading = False
    _dots_group: WeightGroup | None = None

    def dots_begin(self: Any) -> None:
        """From here to `dots_finish` the model is not fit to generate, and has no version."""
        self._dots_version = None
        self._dots_expected = {name for name, _ in self.get_model().named_parameters()}
        self._dots_loaded: set[str] | None = set()
        with set_current_vllm_config(self.vllm_config):
            if self._dots_loading:
                # What an earlier push left behind when it broke off.
                finalize_layerwise_reload(self.get_model(), self.model_config)
            initialize_layerwise_reload(self.get_model())
        self._dots_loading = True

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
        if not self._dots_loading:
            raise RuntimeError("weights came without dots_begin")
        with set_current_vllm_config(self.vllm_config), torch.no_grad():
            loaded = self.get_model().load_weights(iter(named_tensors))
        # None comes from models that do not say.
        self._dots_loaded = None if loaded is None or self._dots_loaded is None else self._dots_loaded | loaded

    def dots_finish(self: Any, version: str) -> None:
        """Makes what was loaded the weights that generate, under `version`.

        Raises ValueError when a weight of the model did not come.
        """
        with set_current_vllm_config(self.vllm_config):
            finalize_layerwise_reload(self.get_model(), self.model_config)
        self._dots_loading = False
        require_all(self._dots_expected, self._dots_loaded)
        repack_heads(self.get_model())
        self.model_runner.reset_lora_state()
        self._dots_version = int(version)
