"""Weights that a push omitted, and weights that a policy with adapters has to push."""

import pytest
import torch

from app.engines.worker.weight_names import not_pushed
from app.policy.adapters import Lora, add_lora, is_adapted
from app.policy.model import Policy
from app.policy.weights import plain_weights
from tests.support.policies import TINY, tiny_model

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
GIVEN = {f"l.0.attn.{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")} | {"l.0.norm.weight", "head"}
LOADED = {"l.0.attn.qkv_proj.weight", "l.0.attn.qkv_proj.bias", "l.0.norm.weight", "head"}


def test_a_whole_push_lacks_nothing() -> None:
    assert not_pushed(LOADED, LOADED, GIVEN, PACKED) == set()


@pytest.mark.parametrize("name", ["l.0.attn.k_proj.weight", "l.0.attn.v_proj.bias"])
def test_a_part_of_a_merged_layer_is_missed(name: str) -> None:
    assert not_pushed(LOADED, LOADED, GIVEN - {name}, PACKED) == {name}


def test_a_weight_of_its_own_is_missed() -> None:
    assert not_pushed(LOADED, LOADED - {"l.0.norm.weight"}, GIVEN, PACKED) == {"l.0.norm.weight"}


def test_a_layer_that_came_in_one_piece_lacks_no_parts() -> None:
    assert not_pushed(LOADED, LOADED, LOADED, PACKED) == set()


def test_a_tied_head_is_pushed_once() -> None:
    model = Policy(str(TINY)).load()
    names = [name for name, _ in plain_weights(model)]
    assert names == [name for name in model.state_dict() if name != "lm_head.weight"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in dict(plain_weights(tiny_model(12, seed=0)))


def test_only_the_blocks_that_adapters_change_are_pushed_and_merged() -> None:
    model = tiny_model(12, seed=0)
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert not is_adapted(model)
    policy = add_lora(model, Lora(rank=2, target_modules=["q_proj"]))
    assert is_adapted(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_" in name:
                parameter.add_(1.0)
    whole = {name: tensor.clone() for name, tensor in plain_weights(policy)}
    changing = {name: tensor.clone() for name, tensor in plain_weights(policy, changing=True)}
    changed = {name for name, tensor in whole.items() if not torch.equal(tensor, plain[name])}
    assert changed == {name for name in plain if name.endswith("q_proj.weight")}
    assert list(changing) == [name for name in whole if ".self_attn." in name]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in changing.items())
