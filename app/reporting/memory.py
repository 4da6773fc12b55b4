"""Estimate the memory of a training process from the sizes of the policy and of a micro-batch.

All figures are bytes of tensors, without allocator rounding and driver memory. The formulas follow the tensors that
autograd keeps for a Hugging Face decoder with SDPA attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from app.objective.logprobs import CPU_TILE_BYTES, DEVICE_TILE_BYTES
from app.objective.packing import plan_microbatches
from app.objective.shared_prompt import plan_shared
from app.policy.adapters import causal_lm
from app.policy.fused_layers import FusedLayer
from app.policy.liger import HAS_LIGER
from app.policy.model import decoder_layers
from app.policy.weights import count_parameters

_FLOAT = 4
_MOMENTS = 2  # of AdamW
_SUM_BUCKET = 64 * 2**20  # what app.update.gradient_sum reduces at once


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """The sizes of a dense decoder: equal layers of attention and a gated MLP."""

    layers: int
    hidden: int  # width of the residual stream, H
    heads: int
    queries: int  # width of all queries, q
    keys: int  # width of all keys, and of all values, k
    head_dim: int
    intermediate: int  # width of the MLP, I
    vocabulary: int  # V
    tied: bool  # the output head is the embedding
    qk_norm: bool  # queries and keys are normalised
    parameters: int  # of the base model
    layer_parameters: int  # of the largest layer
    root_parameters: int  # outside the layers
    adapters: int = 0  # LoRA parameters
    lora_rank: int = 0
    fused: bool = False  # layers run as app.policy.fused_layers
    liger: bool = False  # Liger's kernels: gated MLPs keep gate and up alone, norms outside fused layers their input
    norm_kernel: bool = False  # the layers' norms are one kernel, which keeps its input alone

    @classmethod
    def of(cls, model: torch.nn.Module) -> DecoderShape:
        """Read the shape of a model, on the meta device or not. Raise ValueError unless it is such a decoder."""
        config: Any = causal_lm(model).config.get_text_config(decoder=True)
        base = [sum(p.numel() for n, p in one.named_parameters() if "lora_" not in n) for one in decoder_layers(model)]
        adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
        adapted = sum(p.numel() for p in adapters.values())
        total = count_parameters(model)[0] - adapted
        names = ("num_attention_heads", "hidden_size", "intermediate_size")
        heads, hidden, width = (getattr(config, name, 1) for name in names)
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        shape = cls(
            layers=len(base), hidden=hidden, heads=heads, queries=heads * head_dim,
            keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim, head_dim=head_dim,
            intermediate=width, vocabulary=config.vocab_size, tied=config.tie_word_embeddings,
            qk_norm=any(name.endswith(".q_norm") for name, _ in model.named_modules()),
            parameters=total, layer_parameters=max(base), root_parameters=total - sum(base), adapters=adapted,
            lora_rank=max((p.shape[0] for name, p in adapters.items() if "lora_A" in name), default=0),
            fused=all(isinstance(one, FusedLayer) and one.can_fuse for one in decoder_layers(model)),
            liger=getattr(causal_lm(model), HAS_LIGER, False),
        )  # fmt: skip
        if abs(shape.layer_matrices / shape.layer_parameters - 1) > 0.02:  # the share of biases and norms
            raise ValueError(f"{type(model).__name__} is not a dense decoder with a gated MLP")
        return shape

    def on(self, device: str, precision: Precision) -> DecoderShape:
        """Return the shape as its layers run on a type of device: fused on GPUs and where autocast casts."""
        fused = self.fused and (device != "cpu" or precision.autocast)
        return replace(self, fused=fused, norm_kernel=device != "cpu" if fused else self.liger)

    @property
    def layer_matrices(self) -> int:
        """Elements of a layer's seven matrices."""
        return self.hidden * (2 * self.queries + 2 * self.keys + 3 * self.intermediate)

    @property
    def cached(self) -> int:
        """Elements of a token's keys and values in all layers."""
        return 2 * self.layers * self.keys


@dataclass(frozen=True, slots=True)
class Precision:
    """Bytes of a weight (its gradient and moments are as wide) and of what a layer reads and writes.

    With `autocast` (`bf16-mixed` without sharding) weights and inputs are cast where they are used, and the residual
    stream stays in float32. peft keeps adapters in float32 in any case.
    """

    weights: int
    compute: int
    autocast: bool = False

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream."""
        return _FLOAT if self.autocast else self.compute


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A forward pass over `n` completions of `T` tokens for `g` prompts of `P` tokens; not `shared`, `g` equals `n`."""

    prompts: int
    completions: int
    prompt_length: int
    completion_length: int
    shared: bool  # a prompt is read once for all its completions (objective.shared_prompt)
    checkpointing: bool = False

    @property
    def written(self) -> int:
        """Tokens of a completion that are read; shared prompts leave out the last one, which predicts nothing."""
        return self.completion_length - self.shared

    @property
    def positions(self) -> int:
        """Tokens that the layers read, `N`."""
        return self.prompts * self.prompt_length + self.completions * self.written

    @property
    def targets(self) -> int:
        """Completion tokens whose log-probabilities are computed."""
        return self.completions * self.completion_length

    @property
    def mask(self) -> int:
        """Elements of the mask of shared prompts: completion tokens by tokens of prompt and completion."""
        return self.completions * self.written * (self.prompt_length + self.written) if self.shared else 0

    def masked(self, precision: Precision) -> bool:
        """Whether attention reads shared prompts with a mask: in half precision it needs none."""
        return self.shared and precision.compute >= _FLOAT


def training_states(shape: DecoderShape, precision: Precision, shards: int = 1) -> tuple[int, int, int]:
    """Return parameters, gradients and AdamW's state of a process, sharded; frozen weights have only parameters."""
    base, adapters = shape.parameters * precision.weights, shape.adapters * _FLOAT
    trained = adapters or base
    return -(-(base + adapters) // shards), -(-trained // shards), -(-_MOMENTS * trained // shards)


def unsharded_layers(shape: DecoderShape, precision: Precision) -> int:
    """Return what FSDP2 holds whole: two layers, the root group, and a layer's float32 gradient until it is reduced.

    One layer is gathered while another computes (Zhao et al., arXiv 2304.11277, section 3.4).
    """
    gathered = (2 * shape.layer_parameters + shape.root_parameters) * precision.compute
    return gathered + (0 if shape.adapters else shape.layer_parameters * _FLOAT)


def autocast_copies(
    shape: DecoderShape, precision: Precision, *, head: bool = False, checkpointing: bool = False
) -> int:
    """Return autocast's copies of the layers' matrices, in rollouts of the head too; updates cast that by tiles.

    With checkpointing they are those of the layer that is computed.
    """
    layers = 1 if checkpointing else shape.layers
    matrices = layers * shape.layer_matrices + (shape.vocabulary * shape.hidden if head else 0)
    return matrices * precision.compute if precision.autocast else 0


def layer_activations(shape: DecoderShape, precision: Precision, batch: MicroBatch) -> int:
    """Return what a layer keeps for its backward pass.

    Per position: two norms (their float32 input and, unless the weight is frozen, their output); the MLP `3 I` (gate,
    its SiLU, up); attention `2 q + 2 k` and a log-sum-exp per head; the inputs of the seven matrices where nothing else
    keeps them, under autocast a cast for each matrix. With LoRA a matrix keeps `rank` elements and a float32 cast of
    its input. Shared prompts with a mask: attention reads `g` prompts and then `n` completions with the keys and values
    of their prompts, all heads: `4 q` per prompt token, `n (2 q t + 2 q (P + t))` for `t` read tokens, and the mask.
    Liger's MLP keeps `2 I` (gate, up). Fused layers: the norms' kernels keep their inputs and a number per row,
    matrices that read the same keep it once, and of norms of heads their float32 input is kept.
    """
    c, H, q, I = precision.compute, shape.hidden, shape.queries, shape.intermediate  # noqa: E741
    norms = 2 * H * _FLOAT + (0 if shape.adapters else 2 * H * precision.stream)
    head_norms = (q + shape.keys) * (_FLOAT + (0 if shape.adapters else c)) if shape.qk_norm else 0
    if shape.norm_kernel:
        norms = 2 * (H * precision.stream + _FLOAT)
    if shape.fused and shape.qk_norm:
        head_norms = (q + shape.keys) * _FLOAT * (1 if shape.norm_kernel else 2)
    inputs = 7 * shape.lora_rank * (c if precision.autocast else _FLOAT)
    if shape.adapters and c < _FLOAT and not precision.autocast:
        inputs += _FLOAT * (5 * H + q + I)
    else:
        joined = batch.masked(precision) or (shape.adapters > 0 and precision.autocast)
        own = precision.autocast and not shape.fused  # a cast for each matrix
        inputs += c * ((5 if own else 2) * H + (q if joined else 0) + I)
    attention = batch.positions * 2 * (q + shape.keys)
    if batch.masked(precision):
        seen = batch.completions * (4 * batch.written + 2 * batch.prompt_length) * q
        attention = batch.prompts * batch.prompt_length * 4 * q + seen + batch.mask
    per_position = norms + head_norms + shape.heads * _FLOAT + (2 if shape.liger else 3) * I * c + inputs
    return batch.positions * per_position + attention * c


def kept_activations(shape: DecoderShape, precision: Precision, batch: MicroBatch) -> tuple[int, int]:
    """Return what a forward pass leaves for the backward pass: below the head, and for the head.

    Below: all layers (with checkpointing their inputs only), rotary tables, and the batch (24 bytes per position, about
    40 per target, 1 per element of the mask). Head: last norm, hidden states that predict, two float32 per target.
    """
    n, s = batch.positions, precision.stream
    layer = n * shape.hidden * s if batch.checkpointing else layer_activations(shape, precision, batch)
    mask = batch.mask if batch.masked(precision) else 0
    inputs = n * 2 * shape.head_dim * s + 24 * n + 40 * batch.targets + mask
    norm = shape.hidden * s + _FLOAT if shape.liger else shape.hidden * (_FLOAT + (0 if shape.adapters else s))
    return shape.layers * layer + inputs, n * norm + batch.targets * (shape.hidden * s + 2 * _FLOAT)


def update_peak(shape: DecoderShape, precision: Precision, batch: MicroBatch, tile_bytes: int) -> int:
    """Return the most that a forward and backward pass holds on top of the training states.

    1. The head's backward pass with all activations: its gradient `V H`, three tiles of logits, and the gradient of
       the hidden states in float32, as well as a float32 copy of those that are not.
    2. The last layer's MLP when the head's activations are freed; with checkpointing that layer was recomputed from
       its input. Three gradients of `I` elements per position less one freed tensor, two of the stream, and a matrix's
       gradient; LoRA in half precision adds a float32 one of `I`. A tied head's gradient waits for the embedding's.
    3. The embedding's dense gradient, with the head's where it is tied.
    """
    c, s, n = precision.compute, precision.stream, batch.positions
    below, predicting = kept_activations(shape, precision, batch)
    below += autocast_copies(shape, precision, checkpointing=batch.checkpointing)
    head = 0 if shape.adapters else shape.vocabulary * shape.hidden * precision.weights
    tiles = 3 * min(tile_bytes, batch.targets * shape.vocabulary * _FLOAT)
    first = below + predicting + head + tiles + (1 if s == _FLOAT else 2) * batch.targets * shape.hidden * _FLOAT
    recomputed = layer_activations(shape, precision, batch) - (n * shape.hidden * s if s == _FLOAT else 0)
    matrix = 0 if shape.adapters else shape.hidden * shape.intermediate * precision.weights
    cast = _FLOAT if shape.adapters and c < _FLOAT else 0
    mlp = n * (shape.intermediate * (2 * c + cast) + 2 * shape.hidden * s) + matrix
    second = below + head + mlp + (recomputed if batch.checkpointing else 0)
    return max(first, second, (1 + shape.tied) * head)


def decode_workspace(shape: DecoderShape, width: int, rows: int, columns: int, prefill_tokens: int, cache: int) -> int:
    """Return what the Transformers engine needs on top of cache and weights.

    The largest of: a layer's attention scores in a decode step (three times); logits and two float32 copies; the first
    prefill, before the cache exists; a later prefill, of the eighth of the rows that must be free for it.
    """
    scores = 3 * rows * columns * shape.heads * max(width, _FLOAT)
    logits = rows * shape.vocabulary * (2 * _FLOAT + (width if width < _FLOAT else 0))
    prefill = prefill_tokens * (shape.cached + 3 * shape.intermediate + 2 * shape.queries + 4 * shape.hidden) * width
    return max(scores, logits, prefill // 8, prefill - cache)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The work of a step over all processes; lengths are upper bounds in tokens."""

    processes: int
    shards: int  # processes that hold one copy of the policy together; 1 without FSDP2
    device: str  # type of device
    prompts: int  # in a mini-batch
    rolled_out: int  # prompts rolled out together
    generations: int  # completions per prompt
    prompt_length: int
    completion_length: int
    max_tokens: int  # of a micro-batch
    shared: bool  # a prompt is read once for all its completions
    has_reference: bool  # a reference policy is needed: a frozen copy without LoRA
    max_rows: int = 0  # completions that the policy's own process decodes together; 0 where another process generates
    max_cache_tokens: int = 0
    prefill_tokens: int = 0
    spare_columns: int = 0  # of the key-value cache


class Part(NamedTuple):
    """One kind of memory: bytes per process, and the phase of a step that holds them."""

    name: str
    bytes: int
    phase: Literal["always", "backward pass", "gradient sum", "rollout"]


def memory_parts(policy: torch.nn.Module, precision: Precision, step: StepSizes) -> list[Part]:
    """Return the parts of a process's memory that are not 0. Raise ValueError as `DecoderShape.of`."""
    shape, on_cpu, sharded = DecoderShape.of(policy).on(step.device, precision), step.device == "cpu", step.shards > 1
    parameters, gradients, optimizer = training_states(shape, precision, step.shards)
    prompts, lengths = math.ceil(step.prompts / step.processes), (step.prompt_length, step.completion_length)
    owner = [row // step.generations for row in range(prompts * step.generations)]
    if step.shared:
        first = plan_shared(owner, [lengths[0]] * prompts, [lengths[1]] * len(owner), step.max_tokens)[0]
        read = len({owner[row] for row in first})
    else:
        first = plan_microbatches([sum(lengths)] * len(owner), step.max_tokens)[0]
        read = len(first)
    batch = MicroBatch(read, len(first), *lengths, step.shared, causal_lm(policy).is_gradient_checkpointing)
    kept = sum(kept_activations(shape, precision, batch))
    copies = autocast_copies(shape, precision, checkpointing=batch.checkpointing)
    peak = update_peak(shape, precision, batch, CPU_TILE_BYTES if on_cpu else DEVICE_TILE_BYTES)
    reference = shape.parameters * precision.weights if step.has_reference and not shape.adapters else 0
    replicated, largest = (
        step.processes > 1 and not sharded,
        0 if shape.adapters else shape.vocabulary * shape.hidden * _FLOAT,
    )
    always = {"parameters": parameters, "gradients": gradients, "optimizer state": optimizer}
    always |= {"frozen reference": reference}
    parts = [
        *(Part(name, size, "always") for name, size in always.items()),
        Part("unsharded layers", unsharded_layers(shape, precision) if sharded else 0, "backward pass"),
        Part("autocast copies of weights", copies, "backward pass"),
        Part("activations of a micro-batch", kept, "backward pass"),
        Part("log-prob tiles, gradients in flight", peak - kept - copies, "backward pass"),
        Part("sum over processes", max(_SUM_BUCKET, largest) if replicated else 0, "gradient sum"),
    ]
    if step.max_rows:
        width, columns, prompts = precision.compute, sum(lengths), math.ceil(step.rolled_out / step.processes)
        rows = max(1, min(step.max_rows, prompts * step.generations, step.max_cache_tokens // columns))
        tokens = rows * (lengths[1] + step.spare_columns) + min(prompts, rows) * lengths[0]
        cache, prefill = tokens * shape.cached * width, min(step.prefill_tokens, lengths[0] * prompts)
        whole = shape.parameters * width if sharded else autocast_copies(shape, precision, head=True)
        held = decode_workspace(shape, width, rows, columns, prefill, cache)
        named = {"whole policy": whole, "key-value cache": cache, "decode step or prefill": held}
        parts += [Part(name, size, "rollout") for name, size in named.items()]
    return [part for part in parts if part.bytes]
