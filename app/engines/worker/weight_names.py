"""Whether a push was complete, by the names of what came. Needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def not_pushed(expected: set[str], loaded: set[str], given: set[str], packed: Mapping[str, Sequence[str]]) -> set[str]:
    """Weights that a push of all weights left out.

    Args:
        expected: names of the model's parameters.
        loaded: those of them that something was loaded into.
        given: names in the checkpoint of all tensors pushed.
        packed: what vLLM makes one layer of, by that layer's name: `q_proj`, `k_proj` and `v_proj` of `qkv_proj`.
    """
    missing = expected - loaded
    for name in loaded:
        module, _, last = name.rpartition(".")
        before, _, layer = module.rpartition(".")
        parts = {f"{before}.{part}.{last}" for part in packed.get(layer, ())}
        # None of them: the checkpoint has the layer in one piece, or under other names.
        if parts & given:
            missing |= parts - given
    return missing
