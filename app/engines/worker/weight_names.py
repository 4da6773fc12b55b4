"""The completeness check of a push. Separate from `reload`, so that it can be tested without vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def not_pushed(expected: set[str], loaded: set[str], given: set[str], packed: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the weights that a push of all weights omitted.

    Args:
        expected: names of the model's parameters.
        loaded: those of them that something was loaded into.
        given: names in the checkpoint of all pushed tensors.
        packed: by the name of a layer that vLLM merges, the names of its parts: `q_proj`, `k_proj` and `v_proj` for
            `qkv_proj`.
    """
    missing = expected - loaded
    for name in loaded:
        module, _, last = name.rpartition(".")
        before, _, layer = module.rpartition(".")
        parts = {f"{before}.{part}.{last}" for part in packed.get(layer, ())}
        # If no part was given, the checkpoint has the layer in one piece or under other names.
        if parts & given:
            missing |= parts - given
    return missing
