"""Fused decoder layers, compared with the layers' own forward in transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from app.objective.packing import PackedBatch, ScoredSequence, collate, pack
from app.policy import fused_layers
from app.policy.adapters import Lora
from app.policy.fused_layers import FusedLayer, fuse_layers, holding_weights
from app.policy.model import Policy
from app.policy.modes import switch_off_dropout
from app.policy.scoring import completion_logprobs

SIZES = {
    "vocab_size": 29, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip
FUSED = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES),
}
OTHERS = {
    "gemma": GemmaConfig(**SIZES),  # modules of the same names, but norms multiply by 1 + weight
    "olmo2": Olmo2Config(**SIZES),
    "gpt2": GPT2Config(vocab_size=29, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "sliding": MistralConfig(**SIZES, sliding_window=4),
}


def model_of(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model whose norms and biases have weights, too, in the mode of an update."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    switch_off_dropout(model)
    return model


@pytest.fixture(scope="module")
def sequences() -> list[ScoredSequence]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 29, length) for length in (5, 3)]
    return [
        ScoredSequence(prompts[owner], rng.integers(0, 29, length), -rng.random(length), 1.0, 0.1)
        for owner, length in [(0, 9), (0, 4), (1, 6), (1, 7)]
    ]


def run(model: PreTrainedModel, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the log-probabilities and the gradient of their weighted sum, by parameter."""
    model.zero_grad()
    logprobs, _ = completion_logprobs(model, packed, 1.0, with_entropy=False)
    (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
    return logprobs.detach(), {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("lay_out", [collate, pack])
@pytest.mark.parametrize("family", FUSED)
def test_float32_values_and_gradients(
    family: str, lay_out: object, sequences: list[ScoredSequence], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, packed = model_of(FUSED[family]), lay_out(sequences)  # type: ignore[operator]
    own, own_gradients = run(model, packed)
    names = set(model.state_dict())
    fuse_layers(model)
    assert [isinstance(layer, FusedLayer) for layer in model.model.layers] == [True, True]
    assert set(model.state_dict()) == names
    same, same_gradients = run(model, packed)
    assert torch.equal(same, own)  # on a CPU without autocast it is the layer's own forward
    assert all(torch.equal(same_gradients[name], one) for name, one in own_gradients.items())
    monkeypatch.setattr(fused_layers, "pays", lambda hidden: True)
    fused, gradients = run(model, packed)
    assert not torch.equal(fused, own)
    torch.testing.assert_close(fused, own, rtol=1e-6, atol=5e-6)
    assert gradients.keys() == own_gradients.keys()
    for name, one in own_gradients.items():
        assert (gradients[name] - one).norm() <= 1e-5 * one.norm(), name


@pytest.mark.parametrize("lay_out", [collate, pack])
@pytest.mark.parametrize("family", FUSED)
def test_mixed_precision_is_as_near_to_float32(family: str, lay_out: object, sequences: list[ScoredSequence]) -> None:
    model, packed = model_of(FUSED[family]), lay_out(sequences)  # type: ignore[operator]
    exact, exact_gradients = run(model, packed)

    def errors() -> tuple[float, float]:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            found, gradients = run(model, packed)
        apart = sum(float((gradients[name] - one).square().sum()) for name, one in exact_gradients.items())
        return float((found - exact).square().mean().sqrt()), apart**0.5

    own = errors()
    fuse_layers(model)
    fused = errors()
    assert min(own) > 0
    assert fused[0] < 1.25 * own[0]
    assert fused[1] < 1.25 * own[1]


@pytest.mark.parametrize("family", OTHERS)
def test_other_layers_stay(family: str, sequences: list[ScoredSequence], tmp_path: Path) -> None:
    model_of(OTHERS[family]).save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded = Policy(str(tmp_path)).load()
    assert not any(isinstance(layer, FusedLayer) for layer in loaded.modules())
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected, found = (run(model.eval(), collate(sequences)) for model in (own, loaded))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], one) for name, one in expected[1].items())


def test_adapted_layers_run_as_they_are(sequences: list[ScoredSequence], tmp_path: Path) -> None:
    model_of(FUSED["qwen2"]).save_pretrained(tmp_path)
    policy = Policy(str(tmp_path), lora=Lora(rank=2)).load().eval()
    layers = [layer for layer in policy.modules() if isinstance(layer, FusedLayer)]
    assert [layer.can_fuse for layer in layers] == [False, False]
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), holding_weights(policy.get_base_model()):  # type: ignore[operator]
        assert all(layer.held is None for layer in layers)


def test_held_weights_give_the_same_and_are_given_back(sequences: list[ScoredSequence]) -> None:
    model, packed = model_of(FUSED["qwen2"]), collate(sequences)
    fuse_layers(model)
    layer = model.model.layers[0]

    def logprobs() -> Tensor:
        return completion_logprobs(model, packed, 1.0, with_entropy=False)[0]

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = logprobs()
        with holding_weights(model):
            assert layer.held.qkv[0].dtype == torch.bfloat16
            assert layer.held.qkv[0].shape == (4 * 8 + 2 * 2 * 8, 32)
            assert torch.equal(logprobs(), expected)
        assert layer.held is None
        with pytest.raises(KeyError), holding_weights(model):
            raise KeyError
        assert layer.held is None
    with torch.no_grad(), holding_weights(model):
        assert layer.held is None  # nothing to cast
