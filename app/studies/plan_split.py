"""Which ways there are to use the GPUs, which of them fits and takes least time, and what to change when none fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from app.studies.plan_gpu import (
    EngineMemory,
    Machine,
    StepTime,
    TrainerMemory,
    engine_memory,
    step_time,
    trainer_memory,
)
from app.studies.plan_run import Run
from app.studies.plan_shapes import DecoderShape, shape_of


@dataclass(frozen=True, slots=True)
class Split:
    """One way to use the GPUs.

    Attributes:
        trainers: GPUs that train.
        engines: vLLM engines, on GPUs of their own; 0 where the trainers generate themselves.
        tensor_parallel: GPUs per engine.
        sharded: FSDP2; else each trainer holds the whole policy.
        trainer: memory of a trainer GPU.
        engine: of an engine GPU; None without.
        seconds: of a step.
        passes: micro-batches per trainer and optimizer step.
        fits: whether all of it does.
    """

    trainers: int
    engines: int
    tensor_parallel: int
    sharded: bool
    trainer: TrainerMemory
    engine: EngineMemory | None
    seconds: StepTime
    passes: int
    fits: bool

    @property
    def gpus(self) -> int:
        return self.trainers + self.engines * self.tensor_parallel

    def __str__(self) -> str:
        how = "FSDP2" if self.sharded else "DDP" if self.trainers > 1 else "one process"
        parts = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        rest = f"{self.engines} vLLM engines{parts}" if self.engines else "no engine of its own"
        return f"{self.trainers} trainers ({how}), {rest}".replace("1 trainers", "1 trainer").replace(
            "1 vLLM engines", "1 vLLM engine"
        )


def splits(shape: DecoderShape, run: Run, machine: Machine, engine: str = "auto") -> list[Split]:
    """All ways to use the GPUs: those that fit by time, DDP before FSDP2 where they are equal; then the others, the
    one that lacks least memory first."""
    found = [one for sharded in (False, True) for one in _with_sharding(shape, run, machine, engine, sharded)]
    return sorted(
        found, key=lambda one: (not one.fits, one.seconds.total if one.fits else one.trainer.peak, one.sharded)
    )


def _with_sharding(shape: DecoderShape, run: Run, machine: Machine, engine: str, sharded: bool) -> Iterator[Split]:
    most = max(1, run.prompts // run.mini_batches)  # a prompt for every rank in a mini-batch
    if engine != "vllm" and machine.gpus <= most and (machine.gpus > 1 or not sharded):
        yield _split(shape, run, machine, machine.gpus, 0, 1, sharded)
    if engine == "transformers":
        return
    for parallel in _parallels(shape, run, machine):
        for engines in range(1, (machine.gpus - 1) // parallel + 1):
            trainers = machine.gpus - engines * parallel
            if trainers <= most and (trainers > 1 or not sharded):
                yield _split(shape, run, machine, trainers, engines, parallel, sharded)


def _parallels(shape: DecoderShape, run: Run, machine: Machine) -> list[int]:
    """GPUs per engine: as given, else the fewest that hold the weights and a group's completions."""
    if machine.tensor_parallel:
        return [machine.tensor_parallel]
    sizes = [2**power for power in range(8) if 2**power < machine.gpus and shape.heads % 2**power == 0]
    held = [size for size in sizes if engine_memory(shape, run, machine, size).sequences >= run.generations]
    return held[:1] or sizes[-1:]


def _split(
    shape: DecoderShape, run: Run, machine: Machine, trainers: int, engines: int, parallel: int, sharded: bool
) -> Split:
    trainer = trainer_memory(shape, run, trainers, sharded=sharded, generates=not engines)
    engine = engine_memory(shape, run, machine, parallel) if engines else None
    holds = trainer.peak <= machine.memory and (engine is None or engine.sequences >= 1)
    seconds, passes = step_time(shape, run, machine, trainers, engines, parallel, sharded, engine)
    return Split(trainers, engines, parallel, sharded, trainer, engine, seconds, passes, holds)


def remedies(shape: DecoderShape, run: Run, machine: Machine, engine: str) -> list[str]:
    """Single changes of the run after which some split fits, least intrusive first; empty where no single one does."""
    smaller = next((size for size in _halved(run.max_tokens) if _fits(shape, run, machine, engine, size)), None)
    changes: list[tuple[str, Run]] = []
    if smaller:
        changes.append((f"--max_tokens {smaller}", dataclasses.replace(run, max_tokens=smaller)))
    if not run.checkpointing:
        changes.append(("--checkpointing true", dataclasses.replace(run, checkpointing=True)))
    if run.dtype == "float32":
        pure = dataclasses.replace(run, dtype="bfloat16", precision="bf16-true")
        changes.append(("--dtype bfloat16 --precision bf16-true (AdamW's state in bfloat16 as well)", pure))
    found = [text for text, changed in changes if any(one.fits for one in splits(shape, changed, machine, engine))]
    if not run.lora_rank:
        adapted = dataclasses.replace(run, lora_rank=16)
        if any(one.fits for one in splits(shape_of(run.model, adapted.lora), adapted, machine, engine)):
            found.append("--lora_rank 16")
    gpus = machine.gpus
    while gpus < 1024:
        gpus *= 2
        more = dataclasses.replace(machine, gpus=gpus)
        if any(one.fits for one in splits(shape, run, more, engine)):
            found.append(f"--gpus {gpus}")
            break
    return found


def _halved(tokens: int) -> Iterator[int]:
    while tokens > 1024:
        tokens //= 2
        yield tokens


def _fits(shape: DecoderShape, run: Run, machine: Machine, engine: str, tokens: int) -> bool:
    changed = dataclasses.replace(run, max_tokens=tokens)
    return any(one.fits for one in splits(shape, changed, machine, engine))
