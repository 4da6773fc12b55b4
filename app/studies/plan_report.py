"""The tables of `dots plan`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from app.studies.plan_gpu import Machine, TrainerMemory
from app.studies.plan_run import Run
from app.studies.plan_shapes import DecoderShape
from app.studies.plan_split import Split

_GIB, _MIB = 2**30, 2**20
_SHOWN = 6
_WIDTH = 110
Row = tuple[str, str, str]


def print_plan(shape: DecoderShape, run: Run, machine: Machine, found: Sequence[Split], changes: Sequence[str]) -> None:
    """Prints what stands on each GPU of the best split, its time, the other splits, and the recommendation."""
    console = Console(width=max(_WIDTH, Console().width))
    best = found[0]
    console.print(_title(shape, run), highlight=False)
    console.print(_memory_table(shape, run, machine, best))
    console.print(_time_table(machine, best))
    console.print(_splits_table(machine, found))
    for line in advice(run, machine, found, changes):
        console.print(line, highlight=False, markup=False)
    how = machine.efficiency
    console.print(
        f"Memory is counted by formulas that were compared with measured peaks on a CPU; {machine.memory / _GIB:.0f} "
        f"GiB of {machine.gpu.memory_gib:g} are planned with. Times are a model, not a measurement: "
        f"{machine.gpu.name} figures of its maker, {how.update:.0%} of its arithmetic and {how.decode:.0%} of its "
        "memory bandwidth assumed.",
        style="dim", highlight=False,
    )  # fmt: skip


def advice(run: Run, machine: Machine, found: Sequence[Split], changes: Sequence[str]) -> list[str]:
    """What to do, and why."""
    best = found[0]
    if not best.fits:
        need = best.trainer.peak / _GIB
        why = f"does not fit: the closest, {best}, needs {need:.1f} GiB of {machine.memory / _GIB:.1f} on a trainer GPU"
        if best.engine is not None and best.engine.sequences < 1:
            why = f"does not fit: the closest, {best}, leaves an engine no memory for one completion"
        rest = (
            f"any one of these makes it fit: {'; '.join(changes)}"
            if changes
            else (
                "no single change of micro-batch, checkpointing, precision, LoRA or number of GPUs makes it fit: "
                "combine them, or take a smaller model"
            )
        )
        return [why, rest]
    lines = [f"recommended: {best}, about {best.seconds.total:.0f} s per step"]
    other = next((one for one in found if one.fits and bool(one.engines) != bool(best.engines)), None)
    kind = "with vLLM engines" if other is not None and other.engines else "with the trainers generating themselves"
    if other is not None:
        lines.append(f"  {kind} the best is {other}: about {other.seconds.total:.0f} s")
    wider = [one for one in found if not one.fits]
    if not best.sharded and any(one.sharded and one.fits for one in found):
        lines.append("  each trainer holds the whole policy: it fits, and less is sent than with FSDP2")
    if best.sharded and any(not one.sharded for one in wider):
        lines.append("  FSDP2, because a whole copy of the policy with its optimizer does not fit on a GPU")
    share = best.seconds.rollout / best.seconds.total
    lines.append(f"  rollouts take {share:.0%} of a step, updates {best.seconds.update / best.seconds.total:.0%}")
    return lines


def _title(shape: DecoderShape, run: Run) -> str:
    adapters = f", {shape.adapters:,} of them in adapters of rank {run.lora_rank} trained" if shape.adapters else ""
    return (
        f"{shape.name}: {shape.parameters + shape.adapters:,} parameters{adapters}; {shape.layers} layers of "
        f"{shape.hidden}, {shape.heads} heads ({shape.kv_heads} of keys), vocabulary {shape.vocabulary:,}"
        f"{', tied head' if shape.tied else ''}\nweights {run.dtype}, precision {run.precision}; "
        f"{run.prompts} prompts x {run.generations} completions per step (fresh: {run.rolled_out:g} prompts"
        f"{f', reference: {run.references:g}' if run.references else ''}), prompts of {run.prompt_length} and "
        f"completions of up to {run.completion_length} tokens ({run.mean_length:g} on average)"
    )


def _memory_table(shape: DecoderShape, run: Run, machine: Machine, best: Split) -> Table:
    unit, name_of_unit = (_GIB, "GiB") if best.trainer.peak > _GIB else (_MIB, "MiB")
    table = _table(f"{name_of_unit} per GPU: {best}", "trainer", "")
    for name, size, note in trainer_rows(run, best):
        if size:
            table.add_row(name, f"{size / unit:,.2f}", note)
    table.add_row("the most at a time", f"{best.trainer.peak / unit:,.2f}", f"of {machine.memory / unit:,.0f}")
    if best.engine is not None:
        table.add_section()
        engine = best.engine
        over = f"over {best.tensor_parallel} GPUs" if best.tensor_parallel > 1 else "whole"
        table.add_row("engine: weights", f"{engine.weights / unit:,.2f}", over)
        table.add_row("  prefill, logits, graphs", f"{engine.workspace / unit:,.2f}", "assumed")
        table.add_row("  key-value cache", f"{engine.cache / unit:,.2f}", f"{engine.per_token:,} bytes per token")
        longest = run.prompt_length + run.completion_length
        table.add_row("  completions at a time", f"{engine.sequences:,}", f"each of {longest} tokens with its prompt")
    return table


def trainer_rows(run: Run, split: Split) -> list[tuple[str, int, str]]:
    """Name, bytes and note of what stands on a trainer GPU."""
    has: TrainerMemory = split.trainer
    batch, passes = run.microbatches(split.trainers)
    over = f"over {split.trainers} GPUs" if split.sharded else "whole"
    read = f"{batch.positions:,} tokens, {batch.completions} completions; {passes} micro-batches"
    ways = [way for way, on in (("checkpointing", run.checkpointing), ("prompts shared", batch.shared)) if on]
    return [
        ("parameters", has.parameters, over),
        ("gradients", has.gradients, over),
        ("optimizer state", has.optimizer, over),
        ("reference policy", has.reference, "whole"),
        ("DDP's buckets", has.ddp_buckets, "a copy of the gradients"),
        ("update: unsharded layers", has.unsharded, "two layers and the root group"),
        ("  activations of a micro-batch", has.activations, ", ".join([read, *ways])),
        ("  or: sum of gradients", has.exchange, "after the passes"),
        ("  or: optimizer step", has.optimizer_step, "roots of the second moments"),
        ("rollout: gathered policy", has.gathered, "whole, once per phase" if split.sharded else "cast copies"),
        ("  key-value cache", has.cache, "transformers engine"),
        ("  a decode step or prefill", has.decoding, ""),
    ]


def _time_table(machine: Machine, best: Split) -> Table:
    table = _table("seconds per step (a model)", "seconds", "")
    how = machine.efficiency
    seconds = best.seconds
    table.add_row("rollouts", f"{seconds.rollout:,.1f}", "weights and cache read at every decode step")
    table.add_row("updates", f"{seconds.update:,.1f}", f"{best.passes} micro-batches per optimizer step and trainer")
    table.add_row("between trainers", f"{seconds.exchange:,.1f}", f"at {how.link:.0%} of {machine.gpu.link_gbs:g} GB/s")
    if best.engines:
        table.add_row("weight push", f"{seconds.push:,.1f}", f"at {how.push_gbs:g} GB/s")
    table.add_row("in all", f"{seconds.total:,.1f}", "one after the other")
    return table


def _splits_table(machine: Machine, found: Sequence[Split]) -> Table:
    table = _table("other splits", "trainer GiB", "completions at a time", "s per step", "")
    for split in found[:_SHOWN]:
        held = f"{split.engine.sequences:,}" if split.engine is not None else ""
        cells = (f"{split.trainer.peak / _GIB:,.1f}", held, f"{split.seconds.total:,.0f}")
        table.add_row(str(split), *cells, "" if split.fits else "does not fit")
    return table


def _table(title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=_WIDTH)
    table.add_column("", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table
