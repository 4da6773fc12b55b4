"""What stands on each GPU of a run, and how long its step takes, for a given split of the GPUs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from app.objective.logprobs import DEVICE_TILE_BYTES
from app.studies import plan_memory as memory
from app.studies import plan_time as time
from app.studies.plan_run import Run
from app.studies.plan_shapes import DecoderShape
from app.studies.plan_time import Efficiency, Gpu

_VLLM_BATCHED_TOKENS = 8192
_VLLM_SEQUENCES = 256
_VLLM_FIXED = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Machine:
    """What the run may use.

    Attributes:
        gpus: of all hosts.
        gpu: of which kind.
        memory: bytes of one that tensors can take.
        engine_share: of an engine's GPU that vLLM takes.
        tensor_parallel: GPUs that one vLLM engine is cut over; 0 takes the fewest that hold it.
        efficiency: assumptions about speed.
    """

    gpus: int
    gpu: Gpu
    memory: int
    engine_share: float = 0.9
    tensor_parallel: int = 0
    efficiency: Efficiency = field(default_factory=Efficiency)


@dataclass(frozen=True, slots=True)
class TrainerMemory:
    """Bytes on one trainer GPU; `*_total` are the phases, each with parameters, gradients and optimizer state."""

    parameters: int
    gradients: int
    optimizer: int
    reference: int
    ddp_buckets: int
    unsharded: int
    activations: int
    exchange: int
    optimizer_step: int
    gathered: int
    cache: int
    decoding: int

    @property
    def lasting(self) -> int:
        """What is there in every phase."""
        return self.parameters + self.gradients + self.optimizer + self.reference + self.ddp_buckets

    @property
    def update_total(self) -> int:
        """Forward and backward passes, the sum of gradients, the optimizer step: the largest."""
        return self.lasting + max(self.unsharded + self.activations, self.exchange, self.optimizer_step)

    @property
    def rollout_total(self) -> int:
        """The transformers engine; 0 where other GPUs generate."""
        own = self.gathered + self.cache + self.decoding
        return self.lasting + own if self.cache else 0

    @property
    def peak(self) -> int:
        return max(self.update_total, self.rollout_total)


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Bytes on one GPU of a vLLM engine.

    Attributes:
        weights: its part of them.
        workspace: activations of a prefill, logits, and 2 GiB for CUDA graphs and the context (an assumption).
        cache: what is left for keys and values.
        per_token: of the cache.
        sequences: prompts with completions of the greatest length that the cache holds at a time.
    """

    weights: int
    workspace: int
    cache: int
    per_token: int
    sequences: int


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of a step by the model of `plan_time`."""

    rollout: float
    update: float
    exchange: float
    push: float

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.exchange + self.push


def trainer_memory(shape: DecoderShape, run: Run, trainers: int, *, sharded: bool, generates: bool) -> TrainerMemory:
    """What stands on each of `trainers` GPUs."""
    numbers = run.numbers(sharded)
    batch, _ = run.microbatches(trainers)
    states = memory.training_states(shape, numbers, trainers if sharded else 1)
    width = 2 if run.half else 4
    columns = run.prompt_length + run.completion_length
    rows = _rows(run, trainers)
    copies = memory.autocast_copies(shape, numbers, head=True)
    prompts = math.ceil(_fresh(run) / trainers)
    prefill = min(run.prefill_tokens, run.prompt_length * prompts)
    lengths = (run.prompt_length, run.completion_length)
    cache = memory.shared_cache(shape, width, rows, prompts, *lengths) if generates else 0
    return TrainerMemory(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        reference=shape.parameters * numbers.weights if run.reference_policy and not run.lora_rank else 0,
        ddp_buckets=memory.ddp_buckets(shape, numbers) if trainers > 1 and not sharded else 0,
        unsharded=memory.unsharded_layers(shape, numbers) if sharded else 0,
        activations=memory.update_peak(
            shape, numbers, batch, checkpointing=run.checkpointing, tile_bytes=DEVICE_TILE_BYTES
        ),
        exchange=memory.gradient_sum(shape) if trainers > 1 and not sharded else 0,
        optimizer_step=memory.optimizer_workspace(states, foreach=True),
        gathered=(shape.parameters * numbers.compute if sharded else copies) if generates else 0,
        cache=cache,
        decoding=memory.decode_workspace(shape, width, rows, columns, prefill, cache) if generates else 0,
    )


def engine_memory(shape: DecoderShape, run: Run, machine: Machine, tensor_parallel: int) -> EngineMemory:
    """What stands on each GPU of a vLLM engine. Its own figures (workspace) are assumptions."""
    width = 2 if run.half else 4
    weights = shape.parameters * width // tensor_parallel
    read = (2 * shape.intermediate + shape.queries + 2 * shape.keys) // tensor_parallel + 4 * shape.hidden
    logits = _VLLM_SEQUENCES * shape.vocabulary * 4 * 2
    workspace = _VLLM_BATCHED_TOKENS * read * width + logits + _VLLM_FIXED
    cache = max(0, int(machine.memory * machine.engine_share) - weights - workspace)
    per_token = memory.cache_per_token(shape, width, tensor_parallel)
    # A prompt's blocks are shared by its completions.
    group = run.prompt_length + run.generations * run.completion_length
    return EngineMemory(weights, workspace, cache, per_token, cache * run.generations // (per_token * group))


def step_time(
    shape: DecoderShape,
    run: Run,
    machine: Machine,
    trainers: int,
    engines: int,
    parallel: int,
    sharded: bool,
    engine: EngineMemory | None,
) -> tuple[StepTime, int]:
    """Seconds of a step, rollouts and updates one after the other, and a rank's micro-batches per optimizer step."""
    how, gpu, width = machine.efficiency, machine.gpu, 2 if run.half else 4
    peak = gpu.half_tflops if run.half else gpu.float_tflops
    batch, passes = run.microbatches(trainers, run.mean_length)
    done = run.prompts * run.generations / (batch.completions * trainers)
    flops = time.update_flops(shape, batch, checkpointing=run.checkpointing, reference=run.reference_policy)
    concurrent = min(engine.sequences, _VLLM_SEQUENCES) if engine else _rows(run, trainers)
    rollout = time.Rollout(
        completions=_fresh(run) * run.generations / (engines or trainers),
        generations=run.generations,
        prompt_length=run.prompt_length,
        mean_length=run.mean_length,
        longest=run.completion_length,
        concurrent=concurrent,
        tensor_parallel=parallel,
    )
    layer_ms = 0.0 if engines else how.eager_layer_ms
    numbers = run.numbers(sharded)
    exchanged = (
        time.exchange_seconds(shape, numbers, gpu, how, ranks=trainers, sharded=sharded, passes=passes)
        * run.mini_batches
    )
    return StepTime(
        rollout=time.rollout_seconds(shape, width, rollout, gpu, peak, how, layer_ms),
        update=done * flops / (peak * 1e12 * how.update),
        exchange=exchanged,
        push=time.push_seconds(shape, numbers, how) if engines else 0.0,
    ), passes


def _fresh(run: Run) -> float:
    """Prompts that get completions in a step."""
    return run.rolled_out + run.references


def _rows(run: Run, trainers: int) -> int:
    """Completions that the transformers engine decodes together on a rank."""
    columns = run.prompt_length + run.completion_length
    mine = math.ceil(_fresh(run) / trainers) * run.generations
    return max(1, min(run.max_rows, mine, run.max_cache_tokens // columns))
