"""Policies with Liger's kernels, compared with the same policies without, over the whole path of an update.

They need liger-kernel, and on a CPU Triton's interpreter: `make test-liger` installs the package and runs these.
"""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from app.engines import Sampling, Transformers
from app.objective.packing import PackedBatch, ScoredSequence, collate, pack
from app.policy.adapters import Lora, causal_lm
from app.policy.fused_layers import FusedLayer, fuse_layers
from app.policy.liger import FAMILIES, add_liger
from app.policy.model import Policy, full_attention_only
from app.policy.modes import switch_off_dropout
from app.policy.scoring import can_share_prompts, completion_logprobs
from app.reporting import memory
from app.reporting.memory import DecoderShape, MicroBatch
from datamodules.types import Prompt
from tests.benchmarks.kernels import launches_as_operators
from tests.gpu.shapes import DEVICE, on_gpu
from tests.unit.test_memory import PRECISIONS, layout

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None,
        reason="liger-kernel is not installed: make test-liger",
    ),
    pytest.mark.skipif(
        not on_gpu() and os.environ.get("TRITON_INTERPRET") != "1",
        reason="without a GPU the kernels run in Triton's interpreter alone: make test-liger",
    ),
]

SIZES = {
    "vocab_size": 29, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "head_dim": 8, "initializer_range": 0.3,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None}, "phi3": {"partial_rotary_factor": 0.5},
    "granite": {"residual_multiplier": 0.5, "attention_multiplier": 0.3}, "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
"""What families are configured with besides, to have what is their own."""

FUSED = ("llama", "mistral", "qwen2", "qwen3")
NORMS = {
    "gemma2": 9, "gemma3_text": 13, **dict.fromkeys(FUSED, 5), "qwen3": 9,
    **dict.fromkeys(("gemma", "granite", "olmo2", "olmo3", "phi3", "smollm3"), 5),
}  # fmt: skip
"""Norms of two layers and the last one, without those of OLMo's heads, which Liger leaves alone."""


@pytest.fixture(scope="module", autouse=True)
def _interpreter() -> Iterator[None]:
    """Teach Triton's interpreter what compiled kernels have: float arguments as scalars, and CUDA's rsqrt and tanh."""
    if on_gpu():
        yield
        return
    import liger_kernel.ops.geglu as geglu
    import liger_kernel.ops.rms_norm as rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def converted(argument: object) -> object:
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", converted)
        patch.setattr(rms_norm, "rsqrt", lambda number: tl.rsqrt(number))
        patch.setattr(geglu, "tanh", lambda number: 2 * tl.sigmoid(2 * number) - 1)
        yield


def config_of(family: str) -> PreTrainedConfig:
    return AutoConfig.for_model(family, **SIZES, **OWN.get(family, {}))


@pytest.fixture
def policies(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Policy]:
    """Policies on the same files, by their kernels: of the family that the test is given, with norms and biases."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(request.param))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    return {kernels: Policy(str(tmp_path), kernels=kernels) for kernels in ("torch", "liger")}


def half() -> torch.autocast:
    """Compute in half precision, as Lightning sets it; Triton's interpreter has no arithmetic in bfloat16."""
    return torch.autocast(DEVICE, torch.bfloat16 if on_gpu() else torch.float16, cache_enabled=False)


def of(*families: str) -> Any:
    return pytest.mark.parametrize("policies", families, indirect=True)


def loaded(policy: Policy) -> Any:
    model = policy.load().to(DEVICE)
    switch_off_dropout(model)
    return model


def batch(model: Any, *, shared: bool) -> PackedBatch:
    rng = np.random.default_rng(0)
    prompt = rng.integers(1, 29, 3)
    sequences = [
        ScoredSequence(prompt, rng.integers(1, 29, length), -rng.random(length), 1.0, 0.1) for length in (4, 2)
    ]
    assert can_share_prompts(model) is full_attention_only(causal_lm(model).config)
    return (pack if shared else collate)(sequences, device=torch.device(DEVICE))


def backward(logprobs: Tensor, model: Any) -> dict[str, Tensor]:
    """Return the gradient of the log-probabilities' weighted sum, by parameter."""
    (logprobs * torch.linspace(-1, 1, len(logprobs), device=logprobs.device)).sum().backward()
    return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}


def update(model: Any, packed: PackedBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return log-probabilities of a batch and gradients."""
    model.zero_grad()
    logprobs, _ = completion_logprobs(model, packed, 0.9, with_entropy=False)
    return logprobs.detach(), backward(logprobs, model)


def functions(logprobs: Tensor) -> Counter[str]:
    """Return how often each function of Liger's is in the graph of a tensor."""
    found, seen, left = Counter[str](), set(), [logprobs.grad_fn]
    while left:
        if (node := left.pop()) is None or node in seen:
            continue
        seen.add(node)
        left += [before for before, _ in node.next_functions]
        if node.name().startswith("Liger"):
            found[node.name().removesuffix("FunctionBackward").removeprefix("Liger")] += 1
    return found


def assert_alike(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Log-probabilities within 1e-5, and each parameter's gradient within 2e-5 of its norm: rounding of float32."""
    assert float((found[0] - expected[0]).abs().max()) < 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name


@of(*FAMILIES)
def test_values_and_gradients_are_those_without(policies: dict[str, Policy]) -> None:
    """On a CPU in float32, the layers' own forward: fused layers don't fuse."""
    plain, with_liger = loaded(policies["torch"]), loaded(policies["liger"])
    assert list(with_liger.state_dict()) == list(plain.state_dict())
    packed = batch(plain, shared=full_attention_only(plain.config))
    logprobs, _ = completion_logprobs(with_liger, packed, 0.9, with_entropy=False)
    family, fuses = plain.config.model_type, on_gpu() and isinstance(with_liger.model.layers[0], FusedLayer)
    gated = "GELUMul" if family.startswith("gemma") else "FusedGateUpSiLUMul" if fuses else "SiLUMul"
    rotations = 0 if fuses else 1 if family == "smollm3" else 2
    assert functions(logprobs) == +Counter({"RMSNorm": 1 if fuses else NORMS[family], gated: 2, "Rope": rotations})
    assert_alike((logprobs.detach(), backward(logprobs, with_liger)), update(plain, packed))
    # The rest of the process has transformers' own modules.
    other = completion_logprobs(loaded(policies["torch"]), packed, 0.9, with_entropy=False)[0]
    assert not functions(other)


@of("qwen2", "granite")
def test_gradient_checkpointing(policies: dict[str, Policy]) -> None:
    models = []
    for policy in policies.values():
        policy.gradient_checkpointing = True
        models.append(loaded(policy))
    packed = batch(models[0], shared=True)
    expected, found = (update(model, packed) for model in models)
    assert not torch.equal(found[0], expected[0])
    assert_alike(found, expected)


@of(*FUSED)
def test_fused_layers_multiply_joined_matrices_by_one_kernel(policies: dict[str, Policy]) -> None:
    """In half precision, as near to float32 as fused layers are without it."""
    plain, with_liger = loaded(policies["torch"]), loaded(policies["liger"])
    packed = batch(plain, shared=True)
    exact, exact_gradients = update(plain, packed)

    def errors(model: Any) -> tuple[float, float]:
        with half():
            found, gradients = update(model, packed)
        apart = sum(float((gradients[name] - one).square().sum()) for name, one in exact_gradients.items())
        return float((found - exact).square().mean().sqrt()), apart**0.5

    own, fused = errors(plain), errors(with_liger)
    assert 0 < fused[0] < 1.25 * own[0] and 0 < fused[1] < 1.25 * own[1]
    with half():
        logprobs, _ = completion_logprobs(with_liger, packed, 0.9, with_entropy=False)
    assert functions(logprobs) == {"RMSNorm": 1, "FusedGateUpSiLUMul": 2}


@of("qwen2", "olmo2")
def test_adapters(policies: dict[str, Policy]) -> None:
    models = []
    for policy in policies.values():
        policy.lora = Lora(rank=2)
        models.append(loaded(policy))
        torch.manual_seed(1)
        for name, parameter in models[-1].named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    packed = batch(models[0], shared=True)
    expected, found = (update(model, packed) for model in models)
    assert expected[1] and all("lora_" in name for name in expected[1])
    assert_alike(found, expected)


@of("qwen2", "granite")
@pytest.mark.parametrize("precision", ["float32", "half"])
def test_rollouts_with_the_shared_cache(policies: dict[str, Policy], precision: str) -> None:
    """Log-probabilities of the engine are those of the update, within the rounding of the precision."""
    model = loaded(policies["liger"])
    words = {str(number): number for number in range(30)}
    engine = Transformers()
    # The end token is one that the model does not have, so that no row ends before the others.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="0")), eos_token="29")
    engine.setup(model, tokenizer)
    prompts = [Prompt("0", 0, "", "", (3, 7, 1), {})]
    casting = half() if precision == "half" else nullcontext()
    with casting:
        [group] = engine.generate(prompts, Sampling(2, 3), np.arange(2).reshape(1, 2))
        rows = [ScoredSequence(prompts[0].token_ids, one.token_ids, one.logprobs, 1.0, 0.1) for one in group]
        logprobs, _ = completion_logprobs(model, pack(rows, device=torch.device(DEVICE)), 1.0, with_entropy=False)
    rolled_out = torch.from_numpy(np.concatenate([one.logprobs for one in group])).to(DEVICE)
    assert len(rolled_out) == 6
    assert float((logprobs.detach() - rolled_out).abs().max()) < (1e-5 if precision == "float32" else 0.1)


@pytest.mark.skipif(on_gpu(), reason="launches are counted in Triton's interpreter")
@pytest.mark.parametrize("precision", ["32", "mixed"])
@pytest.mark.parametrize("family", ["qwen2", "granite", "smollm3"])
def test_what_is_kept_for_the_backward_pass_is_as_estimated(family: str, precision: str) -> None:
    sizes = SIZES | {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    fuse_layers(model)
    add_liger(model)
    switch_off_dropout(model)
    numbers, planned = PRECISIONS[precision], MicroBatch(3, 12, 30, 25, True)
    shape = DecoderShape.of(model).on("cpu", numbers)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    casting = torch.autocast("cpu", torch.bfloat16, cache_enabled=False) if precision == "mixed" else nullcontext()
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with launches_as_operators(), hooks, casting:
        kept = completion_logprobs(model, layout(planned, shape.vocabulary), 1.0, with_entropy=True)
    estimated = sum(memory.kept_activations(shape, numbers, planned)) + memory.autocast_copies(shape, numbers)
    held_by_the_batch = 24 * planned.positions + 40 * planned.targets + (planned.mask if precision == "32" else 0)
    assert estimated - held_by_the_batch == pytest.approx(sum(saved.values()), rel=0.02)
    assert kept[0].requires_grad
