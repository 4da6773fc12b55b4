"""Time training steps of Dots and of TRL's GRPOTrainer in turn, on the same work.

    python -m tests.benchmarks.throughput --against trl --out DIR

Both train the same policy on the same prompts, with the same number and length of completions and the same threads.
The policy's copy ends a completion only by its padding token, so that all completions have the same length. DIR gets
throughput.json: every pair of steps, mean seconds of the phases, and the median ratio of a step's seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml

from app.policy.model import Policy
from datamodules.errors import UserError
from datamodules.procedural import Procedural, ProceduralTask
from datamodules.types import TrainBatch
from tests.benchmarks.trl_steps import run_trl
from tests.benchmarks.turns import Clock, Side, Step, scripted

CASES = {"all_informative": 1.0, "half_informative": 0.5}
"""Share of the prompts whose completions get different rewards."""

TASKS = (
    ("spell_backward", 0.4, {}),
    ("chain_sum", 0.4, {"min_terms": 4, "max_terms": 11}),
    ("leg_counting", 0.2, {}),
)
Pair = tuple[Step, Step]
"""A step of Dots and the step of TRL after it."""


def main(args: Sequence[str] | None = None) -> None:
    options = _options(args)
    out = Path(options.out).expanduser()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            results = {case: measure(options, case, Path(scratch) / case) for case in options.cases}
    except UserError as error:
        print(f"throughput: error: {error}", file=sys.stderr)
        sys.exit(2)
    (out / "throughput.json").write_text(json.dumps(report(results, vars(options)), indent=2) + "\n")
    print_tables(results)


def measure(options: argparse.Namespace, case: str, folder: Path) -> list[Pair]:
    """Return the alternating steps after the warm-up."""
    folder.mkdir()
    write_policy(options.policy, folder / "policy")
    write_prompts(options.prompts, CASES[case], folder)
    sides = [
        Side("Dots", run_dots, options, folder),
        Side("TRL", run_trl, options, folder, scripted),
    ]
    try:
        for side in sides:
            side.set_up()
        pairs = [(sides[0].step(), sides[1].step()) for _ in range(options.warmup + options.pairs)]
    finally:
        for side in sides:
            side.end()
    return pairs[options.warmup :]


def write_policy(source: str, folder: Path) -> None:
    """Write a copy of the policy whose end token is its padding token, which it never generates.

    So completions have the same length in both trainers without a rule that either would apply at every token. Raise
    UserError for a policy whose padding token is its end token.
    """
    policy = Policy(source)
    tokenizer: Any = policy.load_tokenizer()
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"--policy {source} pads with its end token. Give a policy with a padding token of its own.")
    model: Any = policy.load()
    tokenizer.eos_token = tokenizer.pad_token
    for config in (model.config, model.generation_config):
        config.eos_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_prompts(prompts: int, informative: float, folder: Path) -> None:
    """Write train.jsonl: problems with a column that says whether the prompt's rewards differ."""
    tasks = [ProceduralTask(name, max(1, round(share * prompts)) + 2, params) for name, share, params in TASKS]
    pool = Procedural(tasks, template="{question}\n").load(Policy(str(folder / "policy")).load_tokenizer(), seed=0)
    teaching = round(informative * prompts)
    with (folder / "train.jsonl").open("w") as file:
        for index in range(prompts):
            prompt = pool[index * len(pool) // prompts]
            # Dealt out evenly, so that both kinds have prompts of all lengths.
            differs = (index + 1) * teaching // prompts > index * teaching // prompts
            file.write(json.dumps({"id": prompt.id, "prompt": prompt.prompt, "informative": differs}) + "\n")


def run_dots(options: argparse.Namespace, folder: Path, clock: Clock) -> None:
    """Train the steps of a case, each when it is Dots' turn: plain GRPO with uniform selection, as TRL does."""
    # Slow to import, and the process of TRL, which imports this file too, does not need them.
    from lightning.pytorch import Callback

    from app.cli.dots import DotsCLI, quiet

    torch.set_num_threads(options.threads)
    reward = {"path": "tests.benchmarks.turns.scripted", "correctness": True}
    config = {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "devices": 1, "max_steps": options.warmup + options.pairs, "limit_val_batches": 0,
            "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
            "default_root_dir": str(folder),
            "callbacks": [{"class_path": "callbacks.WeightSync"}, {"class_path": "callbacks.Rollouts"}],
        },
        "model": {
            "class_path": "app.module.GRPOModule",
            "init_args": {
                "policy": {"path": str(folder / "policy")},
                "rewards": [{"class_path": "app.rewards.Function", "init_args": reward}],
                "sampling": {
                    "num_generations": options.num_generations, "max_completion_length": options.completion_length,
                },
                "optimization": {"learning_rate": options.learning_rate, "weight_decay": 0.0},
                "surrogate": {"epsilon_high": 0.2},
                "max_tokens_per_microbatch": options.microbatch_tokens,
            },
        },
        "data": {
            "class_path": "datamodules.online.OnlinePromptDataModule",
            "init_args": {
                "prompts_per_step": options.prompts,
                "val_size": 0,
                "selector": {"class_path": "datamodules.selectors.Uniform"},
                "train": {
                    "class_path": "datamodules.prompts.PromptFile", "init_args": {"path": str(folder / "train.jsonl")},
                },
            },
        },
    }  # fmt: skip
    path = folder / "dots.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    quiet()
    sys.argv[1:] = ["fit", "--config", str(path)]

    class StepStart(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: TrainBatch, batch_idx: int) -> None:
            clock.start()

    class StepEnd(Callback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: TrainBatch, batch_idx: int
        ) -> None:
            phases = {name: batch.ledger.seconds[name] for name in ("rollout", "reward", "update")}
            clock.stop(**phases, completion_tokens=int(batch.ledger.counts["train/tokens"]))

    class TimedFit(DotsCLI):
        def before_fit(self) -> None:
            self.trainer.callbacks = [StepStart(), *self.trainer.callbacks, StepEnd()]

    TimedFit()


def _frames(pairs: Sequence[Pair]) -> tuple[pd.DataFrame, pd.DataFrame]:
    mine, theirs = (pd.DataFrame([dataclasses.asdict(step) for step in side]) for side in zip(*pairs, strict=True))
    return mine, theirs


def report(results: dict[str, list[Pair]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the content of throughput.json: medians of the pairs' ratios, all pairs, mean seconds of the phases."""
    frames = {case: _frames(pairs) for case, pairs in results.items()}
    phases = ["rollout", "reward", "update", "seconds"]
    return {
        "ratio": {case: float((mine.seconds / theirs.seconds).median()) for case, (mine, theirs) in frames.items()},
        "pairs": [
            {"case": case, "dots": dataclasses.asdict(mine), "trl": dataclasses.asdict(theirs)}
            for case, pairs in results.items()
            for mine, theirs in pairs
        ],
        "phases": {
            case: {name: side[phases].mean().to_dict() for name, side in zip(("dots", "trl"), sides, strict=True)}
            for case, sides in frames.items()
        },
        "settings": settings,
    }


def print_tables(results: dict[str, list[Pair]]) -> None:
    """Print a table per case: seconds of each phase, tokens per second, peak memory, and their ratios."""
    for case, pairs in results.items():
        mine, theirs = _frames(pairs)
        rows = []
        for name in ("seconds", "rollout", "reward", "update"):
            label = "seconds per step" if name == "seconds" else f"  {name} s"
            cells = (
                f"{mine[name].mean():.3f}",
                f"{theirs[name].mean():.3f}",
                f"{(mine[name] / theirs[name]).median():.2f}",
            )
            rows.append((label, *cells))
        for name in ("rollout", "update"):
            ours, other = (side.completion_tokens.mean() / side[name].mean() for side in (mine, theirs))
            rows.append((f"completion tokens/s, {name}", f"{ours:,.0f}", f"{other:,.0f}", f"{ours / other:.2f}"))
        tokens = (f"{side.completion_tokens.mean():,.0f}" for side in (mine, theirs))
        rows.append(("completion tokens per step", *tokens, ""))
        rows.append(("peak memory of a step, MiB", *(f"{side.peak_mib.max():,.0f}" for side in (mine, theirs)), ""))
        table = pd.DataFrame(rows, columns=["", "Dots", "TRL", "Dots / TRL"]).set_index("")
        print(f"\n{case}: {len(pairs)} pairs of steps\n{table.to_string(index_names=False)}")


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="throughput", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--against", choices=["trl"], default="trl", help="the other trainer: TRL's GRPOTrainer")
    add("--out", required=True, help="folder of throughput.json")
    add("--policy", default="configs/tiny_policy", help="folder of the policy")
    add("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="which prompts are informative")
    add("--pairs", type=int, default=5, help="steps of each trainer that count")
    add("--warmup", type=int, default=2, help="steps of each before them")
    add("--threads", type=int, default=2, help="CPU threads of each")
    add("--prompts", type=int, default=32, help="prompts of a step")
    add("--num_generations", type=int, default=8, help="completions per prompt")
    add("--completion_length", type=int, default=64, help="tokens of every completion")
    add("--learning_rate", type=float, default=1e-5, help="learning rate of both")
    add("--microbatch_tokens", type=int, default=4096, help="tokens of a micro-batch of Dots")
    add("--trl_microbatches", type=int, default=1, help="micro-batches of a step of TRL (gradient accumulation)")
    options = parser.parse_args(args)
    if options.prompts * options.num_generations % options.trl_microbatches:
        parser.error(f"--trl_microbatches {options.trl_microbatches} does not divide the completions of a step")
    return options


if __name__ == "__main__":
    main()
