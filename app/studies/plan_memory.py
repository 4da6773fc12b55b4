"""What takes the memory of a GPU: formulas in the sizes of a decoder and of a micro-batch.

Bytes, as counted tensors; what an allocator rounds up and a driver takes is not in them. They were derived from the
tensors that autograd keeps for a decoder of transformers with SDPA attention, and are compared with measured peaks on
a CPU (`tests/unit/test_plan_memory.py`, `tests/integration/test_plan_peaks.py`). A GPU's attention kernels keep the
same tensors (queries, keys, values, output, log-sum-exp); that was not measured.
"""

from __future__ import annotations

from dataclasses import dataclass

from app.engines.transformers.shared_cache import SLACK
from app.studies.plan_shapes import DecoderShape

_FLOAT = 4
_ADAMW_MOMENTS = 2
_TILES = 3
_SUM_BUCKET = 64 * 2**20
"""What `app.update.gradient_sum` reduces together."""


@dataclass(frozen=True, slots=True)
class Precision:
    """In how many bytes numbers are kept.

    Attributes:
        weights: of a stored parameter; gradients and AdamW's moments are as wide.
        compute: of what a layer reads and writes.
        autocast: whether weights and inputs are cast where they are used (`bf16-mixed` without sharding), and the
            residual stream stays float32.
    """

    weights: int
    compute: int
    autocast: bool = False

    @property
    def stream(self) -> int:
        """Of a number of the residual stream."""
        return _FLOAT if self.autocast else self.compute

    @property
    def adapters(self) -> int:
        """Of a parameter of LoRA, which peft keeps in float32."""
        return _FLOAT


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """`n` completions of `T` tokens of `g` prompts of `P` tokens, read in one pass.

    Attributes:
        prompts: `g`.
        completions: `n`.
        prompt_length: `P`.
        completion_length: `T`.
        shared: whether a prompt is read once for all its completions (`objective.shared_prompt`).
    """

    prompts: int
    completions: int
    prompt_length: int
    completion_length: int
    shared: bool

    @property
    def written(self) -> int:
        """Tokens of a completion that are read: where prompts are shared not its last one, which predicts nothing."""
        return self.completion_length - 1 if self.shared else self.completion_length

    @property
    def positions(self) -> int:
        """`N`, tokens that the layers read."""
        prompts = self.prompts if self.shared else self.completions
        return prompts * self.prompt_length + self.completions * self.written

    @property
    def targets(self) -> int:
        """Completion tokens, whose log-probabilities are taken."""
        return self.completions * self.completion_length

    @property
    def mask(self) -> int:
        """Numbers of the mask of shared prompts: each token of a completion by each of its prompt and itself."""
        return self.completions * self.written * (self.prompt_length + self.written) if self.shared else 0


@dataclass(frozen=True, slots=True)
class States:
    """Bytes that a trainer holds from step to step."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def training_states(shape: DecoderShape, precision: Precision, shards: int = 1) -> States:
    """Parameters, their gradients and AdamW's two moments, each cut over `shards` processes.

    Every trained parameter has a gradient and two moments of its own type; frozen ones (LoRA's base) have none.
    """
    base = shape.parameters * precision.weights
    adapters = shape.adapters * precision.adapters
    trained = adapters or base
    return States(*(-(-size // shards) for size in (base + adapters, trained, _ADAMW_MOMENTS * trained)))


def unsharded_layers(shape: DecoderShape, precision: Precision) -> int:
    """FSDP2, beside the shards: two layers, of which one is gathered while the other computes, and the root group.

    The root group (embedding, last norm, head) is gathered at the start of a forward and kept to the end of its
    backward. In the backward a layer's whole gradient stands beside its weights until it is reduced; in float32,
    which is what gradients are summed in. Zhao et al., arXiv 2304.11277, section 3.4; FSDP2 as of torch 2.13.
    """
    gathered = (2 * shape.layer_parameters + shape.root_parameters) * precision.compute
    return gathered + (0 if shape.adapters else shape.layer_parameters * _FLOAT)


def autocast_copies(shape: DecoderShape, precision: Precision, *, head: bool = False) -> int:
    """Autocast keeps a cast copy of every matrix of the layers until the pass ends, while generating of the head too.

    (In an update the head is cast tile by tile.)
    """
    if not precision.autocast:
        return 0
    matrices = shape.layers * shape.layer_matrices + (shape.vocabulary * shape.hidden if head else 0)
    return matrices * precision.compute


def layer_activations(shape: DecoderShape, precision: Precision, batch: MicroBatch) -> int:
    """What one layer keeps for its backward pass.

    Per position, in numbers: each of the two norms its input in float32 and the normalised input (for its weight's
    gradient: not where that is frozen); the gated MLP `3 I`: gate, its SiLU, up; attention `2 q` (`q = heads x
    head_dim`) for queries and output, `2 k` for keys and values, a log-sum-exp per head; and what the seven matrices
    read (`_inputs`).

    Shared prompts: attention reads `g` prompts and then `n` completions with their prompts' keys and values beside
    their own, for all heads: `4 q` per prompt token, `n (2 q t + 2 q (P + t))` for completions of `t` read tokens, and
    the mask in the compute type.
    """
    c = precision.compute
    norms = 2 * shape.hidden * _FLOAT + (0 if shape.adapters else 2 * shape.hidden * precision.stream)
    heads_norm = (shape.queries + shape.keys) * (_FLOAT + (0 if shape.adapters else c)) if shape.qk_norm else 0
    sums = shape.heads * _FLOAT
    per_position = norms + heads_norm + sums + 3 * shape.intermediate * c + _inputs(shape, precision, batch.shared)
    return batch.positions * per_position + _attention(shape, batch) * c


def _inputs(shape: DecoderShape, precision: Precision, shared: bool) -> int:
    """Bytes per position of what the matrices of a layer read, where no other part keeps it.

    The first norm's output is read by 3 matrices, the second's by 2, each casting it for itself under autocast. The
    attention output is the attention's own, unless it was joined from prompts and completions. With LoRA each matrix
    keeps its `rank` numbers, and reads through a cast to the adapters' float32 where that is not what it is given.
    """
    c, H, q, I = precision.compute, shape.hidden, shape.queries, shape.intermediate  # noqa: E741
    ranks = 7 * shape.lora_rank * (c if precision.autocast else precision.adapters)
    if shape.adapters and c < _FLOAT and not precision.autocast:
        return _FLOAT * (5 * H + q + I) + ranks
    joined = shared or (shape.adapters > 0 and precision.autocast)
    return c * ((5 if precision.autocast else 2) * H + (q if joined else 0) + I) + ranks


def _attention(shape: DecoderShape, batch: MicroBatch) -> int:
    """Numbers that the attention of a layer keeps, without its log-sum-exps."""
    if not batch.shared:
        return batch.positions * 2 * (shape.queries + shape.keys)
    prompts = batch.prompts * batch.prompt_length * 4 * shape.queries
    seen = batch.completions * (4 * batch.written + 2 * batch.prompt_length) * shape.queries
    return prompts + seen + batch.mask


def kept_activations(shape: DecoderShape, precision: Precision, batch: MicroBatch, checkpointing: bool) -> int:
    """What a forward pass leaves for the backward pass: of all layers (with checkpointing their inputs), of the last
    norm and the head, the rotary tables, and the batch itself: three integers per position, about 40 bytes per target
    and a byte for each number of the mask.
    """
    n, s = batch.positions, precision.stream
    layer = n * shape.hidden * s if checkpointing else layer_activations(shape, precision, batch)
    rotary = n * 2 * shape.head_dim * s
    inputs = 24 * n + 40 * batch.targets + batch.mask
    return shape.layers * layer + _head_activations(shape, precision, batch) + rotary + inputs


def _head_activations(shape: DecoderShape, precision: Precision, batch: MicroBatch) -> int:
    """The last norm as in a layer; the hidden states that predict; two float32 numbers per target, no logits."""
    norm = shape.hidden * (_FLOAT + (0 if shape.adapters else precision.stream))
    return batch.positions * norm + batch.targets * (shape.hidden * precision.stream + 2 * _FLOAT)


def update_peak(
    shape: DecoderShape, precision: Precision, batch: MicroBatch, *, checkpointing: bool, tile_bytes: int
) -> int:
    """The most that a forward and backward pass holds beside `training_states`; the largest of three moments.

    1. The head's backward, all activations there: its gradient `V H`, at most three tiles of logits, and the float32
       gradient of the hidden states (and their float32 copy, where they are not).
    2. The last layer's MLP, after the head's activations are gone; with checkpointing that layer's were computed again
       (its input was kept). Three gradients of `I` numbers per position stand while one kept tensor is free again, and
       two of the stream, and a matrix's own gradient; LoRA in half precision adds one of `I` in the adapters' float32.
       A tied head's gradient waits for the embedding's.
    3. The embedding's dense gradient, beside the head's where it is tied.
    """
    c, s, n = precision.compute, precision.stream, batch.positions
    kept = kept_activations(shape, precision, batch, checkpointing) + autocast_copies(shape, precision)
    head = 0 if shape.adapters else shape.vocabulary * shape.hidden * precision.weights
    tiles = _TILES * min(tile_bytes, batch.targets * shape.vocabulary * _FLOAT)
    casts = 1 if s == _FLOAT else 2
    first = kept + head + tiles + casts * batch.targets * shape.hidden * _FLOAT
    again = layer_activations(shape, precision, batch) - (n * shape.hidden * s if s == _FLOAT else 0)
    matrix = 0 if shape.adapters else shape.hidden * shape.intermediate * precision.weights
    cast = _FLOAT if shape.adapters and c < _FLOAT else 0
    mlp = n * (shape.intermediate * (2 * c + cast) + 2 * shape.hidden * s) + matrix
    second = kept - _head_activations(shape, precision, batch) + head + mlp + (again if checkpointing else 0)
    return max(first, second, (1 + shape.tied) * head)


def optimizer_workspace(states: States, *, foreach: bool) -> int:
    """AdamW over lists of tensors (a GPU's default) holds the roots of all second moments at once."""
    return states.optimizer // _ADAMW_MOMENTS if foreach else 0


def ddp_buckets(shape: DecoderShape, precision: Precision) -> int:
    """DDP's reducer holds a second copy of all gradients in its buckets, also where it never reduces."""
    return shape.adapters * precision.adapters or shape.parameters * precision.weights


def gradient_sum(shape: DecoderShape) -> int:
    """`app.update.gradient_sum` copies 64 MiB of gradients at a time in float32, or the largest parameter's."""
    return _SUM_BUCKET if shape.adapters else max(_SUM_BUCKET, shape.vocabulary * shape.hidden * _FLOAT)


def shared_cache(
    shape: DecoderShape, width: int, rows: int, prompts: int, prompt_length: int, completion_length: int
) -> int:
    """The transformers engine's cache (`engines.shared_cache`): whole buffers, with its spare columns."""
    tokens = rows * (completion_length + SLACK) + min(prompts, rows) * prompt_length
    return tokens * cache_per_token(shape, width)


def cache_per_token(shape: DecoderShape, width: int, tensor_parallel: int = 1) -> int:
    """Keys and values of a token in all layers, on one of the GPUs that the heads are cut over (at least one each)."""
    return 2 * shape.layers * max(1, shape.kv_heads // tensor_parallel) * shape.head_dim * width


def decode_workspace(shape: DecoderShape, width: int, rows: int, columns: int, prefill_tokens: int, cache: int) -> int:
    """What the transformers engine needs beside cache and weights.

    The largest of three. A decode step: a layer's products of queries and keys, in parts, whole and as weights; or
    logits, and two float32 copies of them in which a token is drawn. The first prefill, before there is a cache: keys
    and values of the bucket, and of one layer the MLP's three tensors and four of the stream. A later one, of the
    eighth of the rows that has to be free for it.
    """
    scores = 3 * rows * columns * shape.heads * max(width, _FLOAT)
    logits = rows * shape.vocabulary * (2 * _FLOAT + (width if width < _FLOAT else 0))
    prefill = prefill_tokens * (
        cache_per_token(shape, width) + (3 * shape.intermediate + 2 * shape.queries + 4 * shape.hidden) * width
    )
    return max(scores, logits, prefill // 8, prefill - cache)
