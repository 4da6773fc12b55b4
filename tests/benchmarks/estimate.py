"""Estimate the seconds of a step of the published setting on H100s, which nobody has measured.

    python -m tests.benchmarks.estimate

Work is counted: floating-point operations and bytes by formula from the policy's sizes, kernels and the bytes of small
operators by running the layers on a CPU. What a GPU does in a second is assumed (`Machine`), below its data sheet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.objective.packing import ScoredSequence, pack
from app.policy.fused_layers import fuse_layers
from app.policy.modes import Recompute, switch_off_dropout
from app.policy.scoring import completion_logprobs
from app.reporting.memory import DecoderShape
from tests.benchmarks.kernels import ALLOCATIONS, kernels, kernels_of_a_gpu

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "qwen2.5_math_1.5b"
_SCALE = 8
PRODUCTS = {"mm", "addmm", "bmm", "attention", "attention_backward", "embedding", "embedding_dense_backward"}
"""Operators that are counted by formula, or belong to no layer."""


@dataclass(frozen=True)
class Machine:
    """What a GPU and its host are taken to do; rates are sustained ones.

    Data sheet of the H100 SXM: 989 TFLOP/s in bfloat16 without sparsity, 3.35 TB/s, NVLink 450 GB/s each way.
    """

    products: float = 400e12  # floating-point operations per second of bfloat16 matrix products, 40% of the data sheet
    attention: float = 250e12  # the same of causal attention, forward and backward
    memory: float = 2.7e12  # bytes per second, 80% of the data sheet
    links: float = 200e9  # bytes per second that each GPU sends in an all-reduce, less than half of NVLink
    host: float = 5e9  # bytes per second between GPU and pageable host memory
    launch: float = 5e-6  # seconds of the host for a kernel
    engine_step: float = 3e-3  # seconds of vLLM per decoded token beside reading weights and cache: schedule, sample
    sleep: float = 1.5  # seconds for vLLM to free its memory, and again to take it (huggingface/trl#4086: 1.3 to 1.6)
    push: float = 1.0  # seconds to load weights that are on the same GPU: a cast and vLLM's loaders
    score: float = 0.018  # seconds of a reward worker for a completion of 1,000 tokens (math-verify, on a CPU)
    between: float = 1.0  # seconds of selection, gathered rollouts (50 MB per rank by gloo), logging


@dataclass(frozen=True)
class Work:
    """A step of the published setting (`configs/paper`), per step over all GPUs.

    512 groups of 8 are trained, half of them replayed, and 80% are taken to teach. 256 prompts are fresh, and 256
    references every second step are rolled out in the same call.
    """

    sequences: int = 3_280  # trained: 512 groups x 8 x 0.8
    group: int = 8
    completions: int = 3_072  # generated: (256 + 256 / 2) x 8
    prompt: int = 150  # tokens, mean
    length: int = 1_000  # tokens of a completion, mean
    deviation: int = 700  # of the lengths
    longest: int = 3_072  # some completion of each GPU has the most that are allowed
    max_rows: int = 512  # decoded together
    microbatch: int = 8_192  # model.max_tokens_per_microbatch
    checkpointing: bool = False
    workers: int = 8  # reward workers of each process, as `dots doctor` advises on a host of 64 cores or more
    checkpoint_every: int = 10


@dataclass(frozen=True)
class Counted:
    """What was counted on a CPU, for a layer in bf16-mixed with shared prompts.

    Attributes:
        kernels: of a micro-batch, forward and backward.
        bytes_per_position: read and written by operators other than matrix products and attention.
        bytes_per_microbatch: the same, whatever the number of positions: casts of weights, sums of gradients.
    """

    kernels: int
    bytes_per_position: float
    bytes_per_microbatch: float


class Line(NamedTuple):
    """A part of a step."""

    part: str
    seconds: float
    source: str


class Moved(TorchDispatchMode):
    """Adds up the bytes that operators read and write, but for `PRODUCTS`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in ALLOCATIONS | PRODUCTS:
            every = tree_flatten((args, kwargs, result))[0]
            tensors = {id(one): one for one in every if isinstance(one, Tensor)}
            self.bytes += sum(one.numel() * one.element_size() for one in tensors.values())
        return result


def moved_bytes(config: Qwen2Config, positions: tuple[int, int], checkpointing: bool) -> tuple[float, float]:
    """Return the bytes that small operators of a layer move in an update: per position, and whatever their number.

    A layer's are the difference of two models; the two parts are told apart by two numbers of `positions`.
    """

    def of(layers: int, length: int) -> tuple[int, int]:
        config.num_hidden_layers, config.vocab_size = layers, 64
        model = Qwen2ForCausalLM(config)
        fuse_layers(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in model.model.layers:
                Recompute(model, layer)
        switch_off_dropout(model)
        ids = [1] * length
        packed = pack([ScoredSequence(ids, ids, [0.0] * length, 1.0, 1.0)])
        casting = torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
        for _ in range(2):  # the gradients of the second micro-batch are added to those of the first
            with Moved() as moved, kernels_of_a_gpu():
                with casting:
                    logprobs, _ = completion_logprobs(model, packed, 1.0, with_entropy=False)
                logprobs.sum().backward()
        return moved.bytes, packed.input_ids.numel()

    (few_two, few), (few_one, _) = of(2, positions[0]), of(1, positions[0])
    (many_two, many), (many_one, _) = of(2, positions[1]), of(1, positions[1])
    fewer, more = few_two - few_one, many_two - many_one
    each = (more - fewer) / (many - few)
    return each, fewer - each * few


def counted(checkpointing: bool) -> Counted:
    """Count for a layer of the published policy, on this CPU, where an eighth of the width takes seconds.

    Bytes per position follow the width, those per micro-batch the weights.
    """
    phase = "update, checkpointed" if checkpointing else "update, shared prompts"
    config = AutoConfig.from_pretrained(PUBLISHED)
    config.hidden_size, config.intermediate_size = config.hidden_size // _SCALE, config.intermediate_size // _SCALE
    each, fixed = moved_bytes(config, (4, 12), checkpointing)
    return Counted(kernels(mixed=True)[phase].total(), each * _SCALE, fixed * _SCALE**2)


def published() -> DecoderShape:
    """Read the sizes of Qwen2.5-Math-1.5B, on the meta device."""
    with torch.device("meta"):
        return DecoderShape.of(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(PUBLISHED)))


def step(shape: DecoderShape, work: Work, machine: Machine, gpus: int, count: Counted) -> Iterator[Line]:
    """Yield the parts of a step, which follow one another, on GPUs that all generate and then all train."""
    yield from _rollout(shape, work, machine, gpus)
    yield from _update(shape, work, machine, gpus, count)
    parameters = shape.parameters
    yield Line("vLLM sleeps and wakes", 2 * machine.sleep, "seen in huggingface/trl#4086: 1.3 to 1.6 s each")
    yield Line("weights to vLLM", machine.push, "assumed; 3 bytes per parameter on the same GPU take 0.01 s")
    scored = work.completions / gpus * machine.score / work.workers
    yield Line(
        "rewards", scored, f"18 ms each (measured on a CPU), {work.workers} workers per process, none overlapped"
    )
    adamw = parameters * 28 / machine.memory
    summed = 2 * parameters * 4 * (gpus - 1) / gpus / machine.links
    yield Line(
        "AdamW, gradients summed", adamw + summed, "28 bytes per parameter; two all-reduces of float32 less 1 / GPUs"
    )
    saved = parameters * 12 / machine.host / work.checkpoint_every
    yield Line(
        "checkpoint",
        saved,
        f"12 bytes per parameter to the host every {work.checkpoint_every} steps, then in background",
    )
    yield Line("selection, exchange, logs", machine.between, "assumed")


def _rollout(shape: DecoderShape, work: Work, machine: Machine, gpus: int) -> Iterator[Line]:
    each, rows = work.completions / gpus, work.max_rows
    # Where not all fit together, a row is filled again until none is left, and then the last ones end.
    steps = work.longest if each <= rows else each * work.length / rows + work.longest - work.length
    weights = 2 * (shape.layers * shape.layer_matrices + shape.vocabulary * shape.hidden)
    # A token reads its prompt and what is written so far, on average half of the length-weighted mean length.
    context = work.prompt + (work.length**2 + work.deviation**2) / work.length / 2
    cache = each * work.length * context * shape.cached * 2
    yield Line(
        "decoding: weights read", steps * weights / machine.memory, f"{steps:,.0f} steps x {weights / 1e9:.1f} GB"
    )
    yield Line(
        "decoding: cache read",
        cache / machine.memory,
        f"{each * work.length / 1e6:.2f}M tokens x {context:,.0f} x 28 KiB",
    )
    yield Line("decoding: the rest of a step", steps * machine.engine_step, "assumed 3 ms per token step of vLLM")


def _update(shape: DecoderShape, work: Work, machine: Machine, gpus: int, count: Counted) -> Iterator[Line]:
    positions = work.sequences * (work.prompt / work.group + work.length - 1) / gpus
    targets = work.sequences * work.length / gpus
    passes = 4 if work.checkpointing else 3  # forward, two gradients, and forward again
    layers = 2 * shape.layers * shape.layer_matrices * positions * passes
    context = work.prompt + (work.length**2 + work.deviation**2) / work.length / 2
    # Scores and sums, each two operations; the gradient takes two and a half times as many.
    attended = 4 * shape.layers * shape.queries * context * targets * (passes - 2 + 2.5)
    head = 8 * shape.vocabulary * shape.hidden * targets  # logits twice, two gradients
    microbatches = positions / work.microbatch
    small = shape.layers * (count.bytes_per_position * positions + count.bytes_per_microbatch * microbatches)
    tiles = targets * shape.vocabulary * 4 * 17  # passes of the head over its tiles of float32 logits
    yield Line(
        "layers: matrix products", layers / machine.products, f"{layers * gpus / 1e15:.1f} PFLOP, {passes} passes"
    )
    yield Line("layers: attention", attended / machine.attention, f"{attended * gpus / 1e15:.1f} PFLOP")
    yield Line("layers: small operators", small / machine.memory,
               f"counted: {count.bytes_per_position / 1e3:,.0f} KB per position and layer, "
               f"{count.bytes_per_microbatch / 1e9:.2f} GB per micro-batch and layer")  # fmt: skip
    yield Line("head: matrix products", head / machine.products, f"{head * gpus / 1e15:.1f} PFLOP in bfloat16")
    yield Line("head: softmax", tiles / machine.memory, "17 passes over float32 logits, 10 MB per token (gpu.md)")
    launched = microbatches * (shape.layers * count.kernels + 100) * machine.launch
    busy = (layers + head) / machine.products + attended / machine.attention + (small + tiles) / machine.memory
    hidden = max(0.0, launched - busy)
    source = f"{count.kernels} kernels per layer and micro-batch: {launched:.1f} s of the host, meanwhile"
    yield Line("launches that the GPU waits for", hidden, source)


def table(lines: list[Line]) -> str:
    """Return Markdown."""
    rows = [f"| {one.part} | {one.seconds:.1f} | {one.source} |" for one in lines]
    total = sum(one.seconds for one in lines)
    return "\n".join(["| part | s | source |", "|---|---|---|", *rows, f"| **step** | **{total:.0f}** | |"])


def main() -> None:
    shape, plain, again = published(), counted(False), counted(True)
    machine = Machine()
    for gpus in (8, 1):
        print(f"\n{gpus} x H100\n\n{table(list(step(shape, Work(), machine, gpus, plain)))}")
    recomputing = step(shape, Work(checkpointing=True, microbatch=32_768), machine, 8, again)
    print(f"\n8 x H100 with gradient checkpointing: {sum(one.seconds for one in recomputing):.0f} s")


if __name__ == "__main__":
    main()
