"""`dots throughput`: time and memory of a training step beside another trainer's, step by step."""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from app.studies.throughput_case import CASES, Work, write_policy, write_prompts
from app.studies.throughput_dots import run_dots
from app.studies.throughput_trl import run_trl
from app.studies.throughput_turns import Side, Step
from datamodules.errors import UserError

DESCRIPTION = (
    "Times training steps of Dots and of another trainer in turn: same policy, prompts, number and length of "
    "completions, threads. The policy's copy ends a completion only by its padding token, so all have the same length. "
    "For example: dots throughput --against trl --out DIR"
)
Pair = tuple[Step, Step]
"""A step of Dots and the step of the other trainer after it."""


def main(args: list[str]) -> None:
    """Runs `dots throughput` with the arguments that follow it."""
    options = _parser().parse_args(args)
    if options.against != "trl":
        raise UserError(f"--against {options.against}: expected trl, the only trainer known here")
    if unknown := [case for case in options.cases if case not in CASES]:
        raise UserError(f"--cases {unknown[0]}: expected some of {', '.join(CASES)}")
    if options.prompts * options.num_generations % options.trl_microbatches:
        raise UserError(
            f"--trl_microbatches {options.trl_microbatches}: expected a divisor of "
            f"{options.prompts * options.num_generations}, the completions of a step"
        )
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        results = {case: measure(options, case, Path(scratch)) for case in options.cases}
    (out / "throughput.json").write_text(json.dumps(report(results, options.as_dict()), indent=2) + "\n")
    print_tables(results)


def measure(options: Any, case: str, scratch: Path) -> list[Pair]:
    """Alternating steps after the warm-up."""
    folder = scratch / case
    folder.mkdir()
    work = Work(
        policy=folder / "policy",
        prompts=options.prompts,
        num_generations=options.num_generations,
        completion_length=options.completion_length,
        warmup=options.warmup,
        pairs=options.pairs,
        microbatch_tokens=options.microbatch_tokens,
        microbatches=options.trl_microbatches,
    )
    write_policy(options.policy, work.policy)
    data = folder / "train.jsonl"
    write_prompts(work, CASES[case], data)
    sides = [
        Side("Dots", run_dots, work, data, folder, options.threads),
        Side("TRL", run_trl, work, data, folder, options.threads),
    ]
    try:
        for side in sides:
            side.set_up()
        pairs = [(sides[0].step(), sides[1].step()) for _ in range(work.steps)]
    finally:
        for side in sides:
            side.end()
    return pairs[options.warmup :]


def report(results: dict[str, list[Pair]], settings: dict[str, Any]) -> dict[str, Any]:
    """What `throughput.json` holds: medians of the pairs' ratios, all pairs, and mean seconds of the phases."""
    return {
        "ratio": {case: ratio(pairs, "seconds") for case, pairs in results.items()},
        "pairs": [
            {"case": case, "dots": dataclasses.asdict(mine), "trl": dataclasses.asdict(theirs)}
            for case, pairs in results.items()
            for mine, theirs in pairs
        ],
        "phases": {
            case: {
                name: {phase: mean(steps, phase) for phase in ("rollout", "reward", "update", "seconds")}
                for name, steps in zip(("dots", "trl"), zip(*pairs, strict=True), strict=True)
            }
            for case, pairs in results.items()
        },
        "settings": settings,
    }


def ratio(pairs: Sequence[Pair], field: str) -> float:
    """Median over the pairs of Dots's number divided by the other's."""
    return statistics.median(getattr(mine, field) / getattr(theirs, field) for mine, theirs in pairs)


def mean(steps: Sequence[Step], field: str) -> float:
    return statistics.fmean(getattr(step, field) for step in steps)


def print_tables(results: dict[str, list[Pair]]) -> None:
    """A table per case: seconds of each phase, tokens per second, peak memory, and their ratios."""
    for case, pairs in results.items():
        mine, theirs = zip(*pairs, strict=True)
        table = Table(title=f"{case}: {len(pairs)} pairs of steps", title_justify="left")
        for heading in ("", "Dots", "TRL", "Dots / TRL"):
            table.add_column(heading, justify="left" if not heading else "right")
        rows = [("seconds per step", "seconds"), *((f"  {name} s", name) for name in ("rollout", "reward", "update"))]
        for label, field in rows:
            table.add_row(label, f"{mean(mine, field):.3f}", f"{mean(theirs, field):.3f}", f"{ratio(pairs, field):.2f}")
        for phase in ("rollout", "update"):
            speeds = [mean(side, "completion_tokens") / mean(side, phase) for side in (mine, theirs)]
            label = f"completion tokens/s, {phase}"
            table.add_row(label, *(f"{speed:,.0f}" for speed in speeds), f"{speeds[0] / speeds[1]:.2f}")
        table.add_row("completion tokens per step", *(f"{mean(s, 'completion_tokens'):,.0f}" for s in (mine, theirs)))
        peaks = [max(step.peak_mib for step in side) for side in (mine, theirs)]
        table.add_row("peak memory of a step, MiB", *(f"{peak:,.0f}" for peak in peaks))
        Console().print(table)


def _parser() -> DotsArgumentParser:
    parser = command_parser("throughput", DESCRIPTION)
    add = parser.add_argument
    add("--against", type=str, default="trl", help="the other trainer: trl (its GRPOTrainer)")
    add("--out", type=str, required=True, help="folder of throughput.json")
    add("--policy", type=str, default="configs/tiny_policy", help="folder of the policy")
    add("--cases", type=list[str], default=list(CASES), help="all_informative, half_informative or both")
    add("--pairs", type=int, default=5, help="steps of each trainer that are counted")
    add("--warmup", type=int, default=2, help="steps of each before them")
    add("--threads", type=int, default=2, help="CPU threads of each")
    add("--prompts", type=int, default=32, help="prompts of a step")
    add("--num_generations", type=int, default=8, help="completions of a prompt")
    add("--completion_length", type=int, default=64, help="tokens of every completion")
    add("--microbatch_tokens", type=int, default=4096, help="tokens of a micro-batch of Dots")
    add("--trl_microbatches", type=int, default=1, help="micro-batches of a step of TRL (gradient accumulation)")
    return parser
