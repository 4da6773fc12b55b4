"""`dots plan`: what a run needs of each GPU, how to split GPUs between trainers and engines, how long a step takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from app.cli.commands import command_parser
from app.cli.parsing import DotsArgumentParser
from app.studies.plan_gpu import Machine
from app.studies.plan_report import print_plan
from app.studies.plan_run import DEFAULTS, ENGINES, read_run
from app.studies.plan_shapes import shape_of
from app.studies.plan_split import Split, remedies, splits
from app.studies.plan_time import GPUS, Efficiency
from datamodules.errors import UserError, nearest

DESCRIPTION = (
    "Plans memory and time of a run without loading weights, from formulas: bytes per GPU, which split of GPUs between "
    "trainers and vLLM engines fits and takes least time, and what to change when none does. For example: dots plan "
    "--model 7B --gpus 8 --gpu H100 --prompts 512 --completion_length 3072"
)
_GIB = 2**30
_ENGINE_SHARE = 0.9
_ASSUMED = Efficiency()
_RUN = (
    ("dtype", str, "of the stored weights: float32, bfloat16 or float16"),
    ("precision", str, "trainer.precision: 32-true, bf16-mixed or bf16-true"),
    ("lora_rank", int, "train adapters of this rank; 0 trains all weights"),
    ("checkpointing", bool, "compute activations again in the backward pass"),
    ("prompts", int, "per step, replayed ones among them"),
    ("rolled_out", float, "of these, the ones that get fresh completions"),
    ("references", float, "prompts of the reference set, per step on average"),
    ("generations", int, "completions of a prompt"),
    ("prompt_length", int, "tokens of a prompt, at most"),
    ("completion_length", int, "tokens of a completion, at most: memory is planned for all of this length"),
    (
        "mean_length",
        float,
        "tokens of a completion, on average, for which time is planned; half of the most by default",
    ),
    ("mini_batches", int, "optimizer steps per step"),
    ("max_tokens", int, "tokens of a micro-batch (model.max_tokens_per_microbatch)"),
    ("share_prompts", bool, "read a prompt once for all its completions in a micro-batch"),
    ("reference_policy", bool, "a KL term: the initial policy stands beside the trained one"),
)


def main(args: list[str]) -> None:
    """Runs `dots plan` with the arguments that follow it."""
    options = _parser().parse_args([_underscored(token) for token in args])
    given = {name: options[name] for name in ("model", *(name for name, _, _ in _RUN))}
    for file in options.config:
        if not Path(file).is_file():
            raise UserError(f"--config {file}: no such file")
    run, known = read_run(options.config, given)
    machine, engine = _machine(options, known)
    shape = shape_of(run.model, run.lora)
    found = splits(shape, run, machine, engine)
    if not found:
        raise UserError(
            f"{machine.gpus} GPUs and {run.prompts} prompts in {run.mini_batches} mini-batches with engine {engine}: "
            "no split has a prompt for every trainer and a GPU for every engine; give more prompts or another --engine"
        )
    changes = [] if found[0].fits else remedies(shape, run, machine, engine)
    print_plan(shape, run, machine, found, changes)
    if options.out:
        path = Path(options.out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "run": dataclasses.asdict(run),
            "shape": dataclasses.asdict(shape),
            "machine": dataclasses.asdict(machine),
            "recommended": _as_dict(found[0]) if found[0].fits else None,
            "splits": [_as_dict(one) for one in found],
            "to_change": changes,
        }
        path.write_text(json.dumps(report, indent=2) + "\n")


def _as_dict(split: Split) -> dict[str, Any]:
    totals = {"update": split.trainer.update_total, "rollout": split.trainer.rollout_total, "peak": split.trainer.peak}
    return dataclasses.asdict(split) | {"trainer_totals": totals, "step_seconds": split.seconds.total}


def _machine(options: Namespace, known: dict[str, Any]) -> tuple[Machine, str]:
    """The machine of the options, of the configuration where they say nothing, and which engine."""
    if options.gpu not in GPUS:
        raise UserError(f"--gpu {options.gpu}: {nearest(options.gpu, GPUS)}")
    engine = options.engine or known.get("engine", "auto")
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: {nearest(engine, ENGINES)}")
    gpu = GPUS[options.gpu]
    figures = {
        name: value
        for name, value in (
            ("memory_gib", options.gpu_memory), ("memory_gbs", options.gpu_bandwidth), ("link_gbs", options.gpu_link)
        )
        if value is not None
    }  # fmt: skip
    if options.gpu_tflops is not None:
        figures |= {"half_tflops": options.gpu_tflops, "float_tflops": options.gpu_tflops}
    for name, value in figures.items():
        if value <= 0:
            raise UserError(f"{name}={value:g}: expected above 0")
    gpu = dataclasses.replace(gpu, **figures)
    gpus = options.gpus if options.gpus is not None else known.get("gpus", 8)
    if gpus < 1 or options.tensor_parallel < 0 or not 0 <= options.reserve < 1:
        raise UserError(
            f"--gpus {gpus}, --tensor_parallel {options.tensor_parallel}, --reserve {options.reserve:g}: expected at "
            "least 1, 0 (the fewest that hold the policy) or more, and a share below 1"
        )
    shares = {"update": options.update_efficiency, "decode": options.decode_efficiency}
    for name, share in shares.items():
        if not 0 < share <= 1:
            raise UserError(f"--{name}_efficiency {share:g}: expected above 0 and at most 1")
    memory = int(gpu.memory_gib * (1 - options.reserve) * _GIB)
    efficiency = dataclasses.replace(_ASSUMED, **shares)
    parallel = options.tensor_parallel or known.get("tensor_parallel", 0)
    return Machine(gpus, gpu, memory, _ENGINE_SHARE, parallel, efficiency), engine


def _underscored(token: str) -> str:
    """`--gpu-memory` as `--gpu_memory`."""
    name, equals, value = token.partition("=")
    return name.replace("-", "_").replace("__", "--", 1) + equals + value if token.startswith("--") else token


def _parser() -> DotsArgumentParser:
    parser = command_parser("plan", DESCRIPTION)
    add = parser.add_argument
    add("--config", type=str, action="append", default=[], help="configuration of a run; may be given several times")
    add("--model", type=str | None, default=None, help="a size (7B), or folder or hub name of a policy")
    for name, kind, text in _RUN:
        shown = "" if "default" in text else f" (by default that of --config, else {DEFAULTS[name]})"
        add(f"--{name}", type=kind | None, default=None, help=text + shown)
    add("--gpus", type=int | None, default=None, help="GPUs of all machines together (that of --config, else 8)")
    add("--gpu", type=str, default="H100", help=f"which: {', '.join(GPUS)}; its figures are the maker's")
    add("--gpu_memory", type=float | None, default=None, help="GiB of a GPU, in place of that kind's")
    add("--gpu_tflops", type=float | None, default=None, help="arithmetic peak in the run's precision")
    add("--gpu_bandwidth", type=float | None, default=None, help="memory bandwidth, 10^9 bytes per second")
    add("--gpu_link", type=float | None, default=None, help="bandwidth between GPUs, 10^9 bytes per second")
    add("--reserve", type=float, default=0.1, help="share of the memory left to context, NCCL and fragmentation")
    add(
        "--engine",
        type=str | None,
        default=None,
        help=f"{', '.join(ENGINES)}: what may generate (--config's, else auto)",
    )
    add("--tensor_parallel", type=int, default=0, help="GPUs per vLLM engine; 0 takes the fewest that hold the policy")
    add("--update_efficiency", type=float, default=_ASSUMED.update, help="assumed share of the arithmetic peak")
    add("--decode_efficiency", type=float, default=_ASSUMED.decode, help="assumed share of the memory bandwidth")
    add("--out", type=str | None, default=None, help="file of the plan as JSON (plan.json)")
    return parser
