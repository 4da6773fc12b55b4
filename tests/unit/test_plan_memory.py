"""The planner's formulas beside the tensors that the program really keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, Qwen3Config

from app.engines.transformers.shared_cache import SharedPromptCache
from app.objective.packing import PackedBatch, ScoredSequence, collate, pack
from app.policy.model import Lora, Policy, add_lora, attending
from app.policy.scoring import score
from app.studies import plan_memory as memory
from app.studies.plan_memory import MicroBatch, Precision
from app.studies.plan_shapes import DecoderShape, counted, shape_of
from app.studies.plan_time import update_flops
from app.update.optimization import Optimization
from datamodules.errors import UserError
from tests.support.policies import TINY

PUBLISHED = {
    "135M": 134_515_008, "0.5B": 494_032_768, "1.5B": 1_543_714_304, "1B": 1_235_814_400, "7B": 7_615_616_512,
    "8B": 8_030_261_248, "32B": 32_763_876_352,
}  # fmt: skip
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
    lora = Lora(rank=options["lora"]) if options.get("lora") else None
    if name == "tiny":
        return shape_of(str(TINY), lora), model_of(AutoConfig.from_pretrained(TINY), mode, **options)
    model = model_of(QWEN3, mode, **options)
    return counted("qwen3", model), model


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_sizes_of_the_table_are_the_published_ones(size: str) -> None:
    assert shape_of(size).parameters == PUBLISHED[size]


def test_a_shape_is_read_from_a_folder() -> None:
    found, model = shape_of(str(TINY)), Policy(str(TINY)).load()
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.layers * found.layer_parameters + found.root_parameters == found.parameters
    # Worked by hand: the four matrices of attention (no key has fewer heads here) and the three of the MLP.
    assert found.layer_matrices == 4 * 128 * 128 + 3 * 128 * 384
    # Besides, a layer has three biases of attention and two norms; the root one embedding and one norm.
    assert found.layer_parameters == found.layer_matrices + 3 * 128 + 2 * 128
    assert found.root_parameters == 262 * 128 + 128


@pytest.mark.parametrize("given", ["9B", "experts"])
def test_what_is_no_dense_decoder_is_refused(given: str, tmp_path) -> None:
    if given == "experts":
        from transformers import MixtralConfig

        MixtralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, num_local_experts=4,
        ).save_pretrained(tmp_path)  # fmt: skip
        given = str(tmp_path)
    with pytest.raises(UserError, match="did you mean '8B'" if given == "9B" else "dense decoder with a gated MLP"):
        shape_of(given)


@pytest.mark.parametrize("lora", [0, 4])
def test_states_are_the_bytes_of_the_tensors(lora: int) -> None:
    shape, model = shape_and_model("tiny", "32", lora=lora)
    optimizer = Optimization().optimizer(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moments = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    found = memory.training_states(shape, PRECISIONS["32"])
    measured = [sum(tensor.nbytes for tensor in each) for each in (list(model.parameters()), gradients, moments)]
    assert [found.parameters, found.gradients, found.optimizer] == measured
    assert found.total == sum(measured)


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
        kept = score(model, packed, 1.0, with_entropy=True)
    inputs = 24 * batch.positions + 40 * batch.targets + batch.mask
    predicted = memory.kept_activations(shape, numbers, batch, False) + memory.autocast_copies(shape, numbers) - inputs
    assert predicted == pytest.approx(sum(saved.values()), rel=0.02)
    assert kept[0].requires_grad


@pytest.mark.parametrize("shared", [True, False])
def test_flops_are_those_of_the_kernels(shared: bool) -> None:
    shape, model = shape_and_model("tiny", "32")
    batch = MicroBatch(2, 8, 24, 20, shared) if shared else MicroBatch(8, 8, 24, 20, shared)
    packed = layout(batch, shape.vocabulary)
    with FlopCounterMode(display=False) as counted:
        logprobs, _ = score(model, packed, 1.0, with_entropy=True)
        logprobs.sum().backward()
    # Attention is left out of the count for the CPU's kernel, and is a few per cent here.
    assert update_flops(shape, batch, checkpointing=False) == pytest.approx(counted.get_total_flops(), rel=0.1)


def test_cache_is_the_engines_own() -> None:
    model = Policy(str(TINY)).load().eval()
    shape, rows, prompts = shape_of(str(TINY)), 5, 2
    cache = SharedPromptCache(shape.layers, rows, prompts, columns=28)
    prefilled = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(24).view(2, 12), past_key_values=prefilled, use_cache=True)
        cache.admit(prefilled, np.array([0, 0, 1, 1, 1]), np.full(rows, 12))
        with attending(model, cache.attention):
            model(input_ids=torch.zeros(5, 1, dtype=torch.long), **cache.inputs(model.device), use_cache=True)
    buffers = [tensor for layer in [*cache.written, *cache.read] for tensor in (layer.keys, layer.values)]
    held = sum(tensor.untyped_storage().nbytes() for tensor in buffers)
    assert memory.shared_cache(shape, 4, rows, prompts, prompt_length=12, completion_length=28) == held
    per_token = sum(layer.keys.nbytes + layer.values.nbytes for layer in prefilled.layers) // 24
    assert memory.cache_per_token(shape, 4) == per_token
    # Two of the four heads on each of two GPUs.
    assert memory.cache_per_token(shape, 4, tensor_parallel=2) == per_token // 2
