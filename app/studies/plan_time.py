"""How long a step takes by its arithmetic and its memory traffic. A model with stated efficiencies, no measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass

from app.studies.plan_memory import MicroBatch, Precision, cache_per_token
from app.studies.plan_shapes import DecoderShape


@dataclass(frozen=True, slots=True)
class Gpu:
    """What a GPU can do, as its maker says (dense, without sparsity).

    Attributes:
        name: of the model.
        memory_gib: its memory.
        half_tflops: bfloat16 arithmetic, 10^12 operations per second.
        float_tflops: float32 arithmetic (torch's default: no TF32).
        memory_gbs: memory bandwidth, 10^9 bytes per second.
        link_gbs: to the other GPUs of the machine, in one direction (NVLink; PCIe 4 x16 for L40S).
    """

    name: str
    memory_gib: float
    half_tflops: float
    float_tflops: float
    memory_gbs: float
    link_gbs: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 312, 19.5, 2039, 300),
        Gpu("H100", 80, 989, 67, 3350, 450),
        Gpu("H200", 141, 989, 67, 4800, 450),
        Gpu("L40S", 48, 362, 91.6, 864, 32),
    )
}
"""Data sheets of A100 80GB SXM, H100 SXM, H200 SXM and L40S."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """What share of a GPU's figures is reached: assumptions, to be replaced by what is measured.

    Attributes:
        update: of the arithmetic peak in forward and backward passes.
        decode: of the memory bandwidth while decoding, and of the arithmetic peak in a prefill.
        link: of the bandwidth between GPUs.
        eager_layer_ms: least time of a layer in a decode step of the transformers engine, which starts its kernels one
            by one; vLLM replays CUDA graphs.
        push_gbs: bandwidth of a weight push to an engine, 10^9 bytes per second.
    """

    update: float = 0.4
    decode: float = 0.6
    link: float = 0.6
    eager_layer_ms: float = 0.8
    push_gbs: float = 10.0


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions that one engine (one GPU, or `tensor_parallel` of them) generates in a step.

    Attributes:
        completions: `S`.
        generations: completions of a prompt, which is read once for all.
        prompt_length: `P`.
        mean_length: tokens of a completion, on average.
        longest: of a completion.
        concurrent: decoded together, at most.
        tensor_parallel: GPUs of the engine.
    """

    completions: float
    generations: int
    prompt_length: int
    mean_length: float
    longest: int
    concurrent: int
    tensor_parallel: int = 1


def update_flops(shape: DecoderShape, batch: MicroBatch, *, checkpointing: bool, reference: bool = False) -> float:
    """Operations of a forward and backward pass; a multiplication with an addition counts two.

    `6 P` per position, `P` being the numbers in the layers' matrices: 2 forward, 4 backward (Kaplan et al., arXiv
    2001.08361, section 2.1), 8 with checkpointing, 2 less with LoRA, whose base gets no gradient. Attention likewise,
    with `4 q` per pair of a query and a key that it sees, 2.5 times that backward, where kernels compute the scores
    again (Dao, arXiv 2307.08691, section 3.1). The head: `V H` numbers per
    completion token only, read once more in the backward pass (`objective.logprobs`). A reference policy adds its
    forward pass.
    """
    passes = 2 + (0 if shape.adapters else 1) + checkpointing + reference
    layers = 2.0 * batch.positions * shape.layer_matrices
    attention = 4.0 * shape.queries * attention_pairs(batch)
    head = 2.0 * batch.targets * shape.vocabulary * shape.hidden
    weight_gradients = 0 if shape.adapters else 1
    return (
        passes * shape.layers * layers
        + head * (3 + weight_gradients + reference)
        + ((3.5 + checkpointing + reference) * shape.layers * attention)
    )


def attention_pairs(batch: MicroBatch) -> float:
    """Pairs of positions of which one sees the other, in a layer."""
    prompt, written = batch.prompt_length, batch.written
    if not batch.shared:
        return batch.completions * (prompt + written) ** 2 / 2
    return batch.prompts * prompt**2 / 2 + batch.completions * (prompt * written + written**2 / 2)


def rollout_seconds(
    shape: DecoderShape, width: int, rollout: Rollout, gpu: Gpu, peak_tflops: float, how: Efficiency, layer_ms: float
) -> float:
    """Time of one engine to generate its completions.

    Decoding is bound by memory: every step reads all weights, and of every live completion its keys and values, which
    sum to `S (T P + T^2 / 2)` tokens of cache for completions of `T` tokens. With `c` decoded together the completions
    come in `S / c` rounds of `T` steps, and the last round goes on to the longest completion. Where many are decoded
    together arithmetic (`2 P` per token) takes longer and counts instead; a step takes at least `layer_ms` per layer.
    The prompts' prefill adds `2 P` operations per prompt token.
    """
    parallel = rollout.tensor_parallel
    rounds = max(1.0, rollout.completions / max(1, rollout.concurrent))
    steps = rounds * rollout.mean_length + max(0.0, rollout.longest - rollout.mean_length)
    bandwidth = gpu.memory_gbs * 1e9 * how.decode
    weights = steps * shape.parameters * width / parallel
    mean = rollout.mean_length
    seen = rollout.completions * (mean * rollout.prompt_length + mean**2 / 2)
    traffic = (weights + seen * cache_per_token(shape, width, parallel)) / bandwidth
    peak = peak_tflops * 1e12 * how.update * parallel
    matrices = 2.0 * (shape.layers * shape.layer_matrices + shape.vocabulary * shape.hidden)
    arithmetic = rollout.completions * mean * matrices / peak
    prompts = rollout.completions / rollout.generations
    prefill = prompts * rollout.prompt_length * 2.0 * shape.layers * shape.layer_matrices / peak
    return max(traffic, arithmetic, steps * shape.layers * layer_ms / 1e3) + prefill


def exchange_seconds(
    shape: DecoderShape, precision: Precision, gpu: Gpu, how: Efficiency, *, ranks: int, sharded: bool, passes: int
) -> float:
    """Time that gradients and weights take between the trainers of a machine, as if nothing of it were hidden.

    DDP: a ring all-reduce sends `2 (n - 1) / n` of the gradients in float32, once per optimizer step. FSDP2: each pass
    gathers the weights twice in the compute type and scatters the gradients once in float32, `(n - 1) / n` of each.
    """
    share = (ranks - 1) / ranks
    bandwidth = gpu.link_gbs * 1e9 * how.link
    if not sharded:
        return 2 * share * shape.trained * 4 / bandwidth
    return passes * share * (2 * shape.parameters * precision.compute + shape.trained * 4) / bandwidth


def push_seconds(shape: DecoderShape, precision: Precision, how: Efficiency) -> float:
    """Time of handing the merged weights to engines on other GPUs, once per step."""
    return shape.parameters * precision.weights / (how.push_gbs * 1e9)


def whole(count: float) -> int:
    """Rounded up, at least one."""
    return max(1, math.ceil(count))
