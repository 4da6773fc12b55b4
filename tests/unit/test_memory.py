"""The memory formulas against the tensors that the program really keeps."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from app.engines.transformers.shared_cache import SLACK, SharedContextCache
from app.objective.packing import PackedBatch, ScoredSequence, collate, pack
from app.policy.adapters import Lora, add_lora
from app.policy.fused_layers import fuse_layers
from app.policy.model import Policy
from app.policy.modes import Recompute, attending, switch_off_dropout
from app.policy.scoring import completion_logprobs
from app.reporting import memory
from app.reporting.memory import DecoderShape, MicroBatch, Precision, StepSizes, memory_parts
from app.update.optimization import Optimization
from tests.benchmarks.kernels import one_kernel_norms
from tests.support.policies import TINY

PRECISIONS = {"32": Precision(4, 4), "true": Precision(2, 2), "mixed": Precision(4, 2, autocast=True)}
QWEN3 = Qwen3Config(
    vocab_size=500, hidden_size=48, intermediate_size=128, num_hidden_layers=3, num_attention_heads=6,
    num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
)  # fmt: skip


def model_of(config: PreTrainedConfig, mode: str, *, checkpointing: bool = False, lora: int = 0) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if mode == "true" else torch.float32)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return (add_lora(model, Lora(rank=lora)) if lora else model).train()


def layout(batch: MicroBatch, vocabulary: int) -> PackedBatch:
    """Random tokens in the sizes of a micro-batch."""
    draw = np.random.default_rng(0)
    each = batch.completions // batch.prompts if batch.shared else 1
    sequences = [
        ScoredSequence(
            prompt, draw.integers(0, vocabulary, batch.completion_length), np.zeros(batch.completion_length), 1.0, 1.0
        )
        for prompt in [draw.integers(0, vocabulary, batch.prompt_length) for _ in range(batch.completions // each)]
        for _ in range(each)
    ]
    return pack(sequences) if batch.shared else collate(sequences)


def shape_and_model(name: str, mode: str, **options: int) -> tuple[DecoderShape, torch.nn.Module]:
    model = model_of(AutoConfig.from_pretrained(TINY) if name == "tiny" else QWEN3, mode, **options)
    return DecoderShape.of(model), model


def test_a_shape_is_read_without_weights() -> None:
    found, model = DecoderShape.of(Policy(str(TINY)).on_meta()), Policy(str(TINY)).load()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.layers * found.layer_parameters + found.root_parameters == found.parameters
    # Worked by hand: the four matrices of attention (no key has fewer heads here) and the three of the MLP.
    assert found.layer_matrices == 4 * 128 * 128 + 3 * 128 * 384
    # A layer also has three biases of attention and two norms; the root has one embedding and one norm.
    assert found.layer_parameters == found.layer_matrices + 3 * 128 + 2 * 128
    assert found.root_parameters == 262 * 128 + 128


@pytest.mark.parametrize("kind", ["experts", "no gate"])
def test_a_model_of_another_kind_is_refused(kind: str) -> None:
    config = (
        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4,
        )
        if kind == "experts"
        else GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"(ForCausalLM|LMHeadModel) is not a dense decoder with a gated MLP"):
        DecoderShape.of(model_of(config, "32"))


@pytest.mark.parametrize("lora", [0, 4])
def test_states_are_the_bytes_of_the_tensors(lora: int) -> None:
    shape, model = shape_and_model("tiny", "32", lora=lora)
    optimizer = Optimization().optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    measured = [sum(tensor.nbytes for tensor in each) for each in (list(model.parameters()), gradients, moments)]
    assert list(memory.training_states(shape, PRECISIONS["32"])) == measured
    assert list(memory.training_states(shape, PRECISIONS["32"], shards=4)) == [-(-size // 4) for size in measured]


@pytest.mark.parametrize("mode", PRECISIONS)
@pytest.mark.parametrize(("shared", "lora"), [(True, 0), (False, 0), (True, 4), (False, 4)])
@pytest.mark.parametrize("name", ["tiny", "qwen3"])
def test_kept_activations_are_what_autograd_saves(name: str, mode: str, shared: bool, lora: int) -> None:
    shape, model = shape_and_model(name, mode, lora=lora)
    batch = MicroBatch(3, 12, 30, 25, shared) if shared else MicroBatch(12, 12, 30, 25, shared)
    packed, numbers = layout(batch, shape.vocabulary), PRECISIONS[mode]
    assert (packed.input_ids.numel(), packed.targets.numel()) == (batch.positions, batch.targets)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    casting = torch.autocast("cpu", torch.bfloat16, enabled=mode == "mixed")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), casting:
        kept = completion_logprobs(model, packed, 1.0, with_entropy=True)
    inputs = 24 * batch.positions + 40 * batch.targets + (batch.mask if mode == "32" else 0)
    below, head = memory.kept_activations(shape, numbers, batch)
    predicted = below + head + memory.autocast_copies(shape, numbers) - inputs
    assert predicted == pytest.approx(sum(saved.values()), rel=0.02)
    assert kept[0].requires_grad


QWEN2 = Qwen2Config(
    vocab_size=500, hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=512,
)  # fmt: skip


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fused_layers_keep_what_autograd_saves(
    config: PreTrainedConfig, device: str, shared: bool, checkpointing: bool
) -> None:
    """In bf16-mixed; on a GPU a norm is one kernel, here an operator that keeps what it keeps."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    fuse_layers(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            Recompute(model, layer)
    switch_off_dropout(model)
    numbers = PRECISIONS["mixed"]
    shape = DecoderShape.of(model).on(device, numbers)
    assert shape.fused and shape.norm_kernel is (device == "cuda")
    batch = MicroBatch(3 if shared else 12, 12, 30, 25, shared, checkpointing)
    packed = layout(batch, shape.vocabulary)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kernels = one_kernel_norms() if device == "cuda" else nullcontext()
    casting = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    with kernels, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), casting:
        kept = completion_logprobs(model, packed, 1.0, with_entropy=True)
    below, head = memory.kept_activations(shape, numbers, batch)
    if not checkpointing:
        below += memory.autocast_copies(shape, numbers)
    # Checkpoints hold the rotary tables as an argument of their layers, not as saved tensors.
    tables = 2 * batch.positions * shape.head_dim * 4 if checkpointing else 0
    predicted = below + head - 24 * batch.positions - 40 * batch.targets
    assert predicted == pytest.approx(sum(saved.values()) + tables, rel=0.05)
    assert kept[0].requires_grad


def step_of(**options: object) -> StepSizes:
    sizes = {
        "processes": 1, "shards": 1, "device": "cpu", "prompts": 2, "rolled_out": 2, "generations": 4,
        "prompt_length": 12, "completion_length": 28, "max_tokens": 4096, "shared": True, "has_reference": False,
    }  # fmt: skip
    return StepSizes(**(sizes | options))  # type: ignore[arg-type]


def test_cache_is_the_engines_own() -> None:
    model = Policy(str(TINY)).load().eval()
    shape, rows, prompts = DecoderShape.of(model), 5, 2
    cache = SharedContextCache(shape.layers, rows, prompts, columns=28, rows_per_context=3)
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(24).view(2, 12), past_key_values=prefilled, use_cache=True)
        cache.admit(prefilled, np.array([0, 0, 1, 1, 1]), np.full(rows, 12))
        with attending(model, cache.attention):
            model(input_ids=torch.zeros(5, 1, dtype=torch.long), **cache.inputs(model.device), use_cache=True)
    buffers = [tensor for layer in [*cache.written, *cache.contexts] for tensor in (layer.keys, layer.values)]
    held = sum(tensor.untyped_storage().nbytes() for tensor in buffers)
    bounds = {"max_rows": rows, "max_cache_tokens": 10**6, "prefill_tokens": 10**6, "spare_columns": SLACK}
    parts = memory_parts(model, PRECISIONS["32"], step_of(rolled_out=prompts, **bounds))
    assert [part.bytes for part in parts if part.name == "key-value cache"] == [held]
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefilled.layers) // 24
    assert shape.cached * 4 == per_token


def test_parts_follow_the_split() -> None:
    policy, precision = Policy(str(TINY)).on_meta(), PRECISIONS["32"]
    size = 4 * 888_192

    def found(**options: object) -> dict[str, int]:
        return {part.name: part.bytes for part in memory_parts(policy, precision, step_of(**options))}

    alone = found()
    assert (alone["parameters"], alone["gradients"], alone["optimizer state"]) == (size, size, 2 * size)
    assert set(alone) == {
        "parameters", "gradients", "optimizer state", "activations of a micro-batch",
        "log-prob tiles, gradients in flight",
    }  # fmt: skip
    copied = found(processes=2, device="cuda", has_reference=True)
    assert copied["frozen reference"] == size and copied["sum over processes"] == 64 * 2**20
    # DDP has no buckets of gradients, and a GPU's AdamW no copies of its state.
    assert set(copied) == {*alone, "frozen reference", "sum over processes"}
    sharded = found(processes=4, shards=4)
    assert sharded["optimizer state"] == 2 * size // 4
    assert sharded["unsharded layers"] == memory.unsharded_layers(DecoderShape.of(policy), precision)
    # Half as many tokens: two of 39 tokens, after a prompt of 12, and not eight after two.
    assert found(max_tokens=12 + 2 * 27)["activations of a micro-batch"] == sum(
        memory.kept_activations(DecoderShape.of(policy), precision, MicroBatch(1, 2, 12, 28, True))
    )
    assert (
        sum(memory.kept_activations(DecoderShape.of(policy), precision, MicroBatch(2, 8, 12, 28, True)))
        == (alone["activations of a micro-batch"])
    )
