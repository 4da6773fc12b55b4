"""What a run will do, in numbers, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback
from rich.console import Console
from rich.table import Table

from app.policy.weights import count_parameters

Row = tuple[str, str, str]


def run_rows(module: Any, datamodule: Any, callbacks: Sequence[Callback], world_size: int, max_steps: int) -> list[Row]:
    """(quantity, per rank, in all): prompts, completions and tokens of a step, and the optimizer steps of the run."""
    prompts = datamodule.prompts_per_step
    replayed = max(
        (one.replayed_per_step(prompts) for one in callbacks if hasattr(one, "replayed_per_step")), default=0
    )
    sampling = module.sampling
    completions = prompts * sampling.num_generations
    fresh = (prompts - replayed) * sampling.num_generations
    rows = [
        _shared("prompts per step", prompts, world_size),
        _shared("  rolled out", prompts - replayed, world_size),
        _shared("  replayed (buffer full)", replayed, world_size),
        _shared("completions per step", completions, world_size),
        _shared("  generated", fresh, world_size),
        _shared("completion tokens generated, at most", fresh * sampling.max_completion_length, world_size),
        ("mini-batches per step", "", str(module.mini_batches)),
        _shared("completions per mini-batch", completions // module.mini_batches, world_size),
        ("tokens per micro-batch, at most", _number(module.max_tokens_per_microbatch), ""),
    ]
    for one in callbacks:
        if hasattr(one, "size") and hasattr(one, "every"):
            rows.append(
                _shared(f"reference completions, every {one.every}", one.size * sampling.num_generations, world_size)
            )
        if hasattr(one, "max_refills"):
            rows.append(("refills of what a filter drops, at most", "", str(one.max_refills)))
    if max_steps > 0:
        steps = -(-max_steps // module.mini_batches)
        rows.append(("steps", "", _number(steps)))
        rows.append(("optimizer steps (trainer.max_steps)", "", _number(max_steps)))
    return rows


def print_run_table(
    module: Any,
    datamodule: Any,
    callbacks: Sequence[Callback],
    *,
    policy: torch.nn.Module,
    world_size: int,
    max_steps: int,
) -> None:
    """Prints the table of a run to the terminal."""
    parameters, trained = count_parameters(policy)
    table = Table(title=f"{module.policy_path} with {type(datamodule.selector).__name__}", title_justify="left")
    table.add_column("")
    table.add_column(f"per rank ({world_size})", justify="right")
    table.add_column("in all", justify="right")
    table.add_row("policy parameters", "", _number(parameters))
    table.add_row("  trained", "", _number(trained))
    for name, pool in datamodule.pools.items():
        table.add_row(f"{name} prompts", "", _number(len(pool)))
    for row in run_rows(module, datamodule, callbacks, world_size, max_steps):
        table.add_row(*row)
    Console().print(table)
    for name, pool in datamodule.pools.items():
        if (report := getattr(pool, "report", None)) is not None:
            Console().print(f"{name}: {report}", highlight=False)


def _shared(name: str, total: int, world_size: int) -> Row:
    return name, _number(-(-total // world_size)), _number(total)


def _number(value: int) -> str:
    return f"{value:,}"
