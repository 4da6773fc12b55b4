"""Check that a refactoring changes no run: record a set of short runs before it, and compare after it.

    python -m tests.benchmarks.same_runs record before.json          # about ten minutes on two cores
    python -m tests.benchmarks.same_runs record after.json
    python -m tests.benchmarks.same_runs compare before.json after.json

A record holds every scalar of every step but those of the clock, the ids of the prompts chosen in every step, a hash of
the completions that the run wrote, and a hash of the final weights. Both records must come from the same machine with
the same packages: what is compared is bitwise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from lightning.pytorch import Callback, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

QUICKSTART = ["--config", "configs/quickstart.yaml"]
SMALL_STEPS = ["--config", "configs/settings/small_steps.yaml", "--trainer.max_steps", "12"]
FSDP2 = [
    "--config", "configs/strategy/fsdp2.yaml", "--trainer.strategy.init_args.sharded_checkpoints", "false",
    "--trainer.devices", "2", "--trainer.max_steps", "8",
]  # fmt: skip
RUNS: dict[str, list[str]] = {
    **{f"quickstart_{seed}": [*QUICKSTART, "--seed_everything", str(seed)] for seed in (0, 1, 2)},
    **{
        arm: [*QUICKSTART, *SMALL_STEPS, "--config", f"configs/arms/{arm}.yaml"]
        for arm in ("dots_rr", "dynamic_sampling", "posterior_rr", "greso")
    },
    "fsdp2": [*QUICKSTART, *FSDP2],
}
_CLOCK = ("time/", "step_time", "tokens_per_second")


class ChosenPrompts(Callback):
    """Write the ids of the prompts that each step chose, one JSON line per step.

    Args:
        path: the file; lines are appended by rank 0.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                file.write(json.dumps([batch.step, [prompt.id for prompt in batch.prompts]]) + "\n")


def record(name: str, arguments: list[str]) -> dict[str, Any]:
    """Run `dots fit ARGUMENTS` in a process of its own and return what it did.

    Raises:
        SystemExit: the run failed; its last lines are in the message.
    """
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        overlay = folder / "chosen.yaml"
        overlay.write_text(
            "trainer:\n  callbacks+:\n    - class_path: tests.benchmarks.same_runs.ChosenPrompts\n"
            f"      init_args: {{path: {folder / 'chosen.jsonl'}}}\n"
        )
        done = subprocess.run(
            [sys.executable, "-m", "app", "fit", *arguments, "--config", str(overlay),
             f"--trainer.logger.init_args.save_dir={folder}"],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")
        run = folder / "quickstart" / "version_0"
        chosen = (folder / "chosen.jsonl").read_text().splitlines()
        found = {
            "scalars": _scalars(run),
            "chosen": dict(json.loads(line) for line in chosen),
            "completions": _hash_completions(run / "completions"),
            "weights": _hash_weights(run / "checkpoints" / "last.ckpt"),
        }
    print(f"{name}: {len(found['chosen'])} steps", flush=True)
    return json.loads(json.dumps(found))


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line per difference between two runs."""
    lines = [
        f"{part} differ: {before[part]} and {after[part]}"
        for part in ("completions", "weights")
        if before[part] != after[part]
    ]
    for step in sorted(before["chosen"].keys() | after["chosen"].keys(), key=int):
        if before["chosen"].get(step) != after["chosen"].get(step):
            lines.append(f"chosen prompts differ from step {step}")
            break
    old, new = before["scalars"], after["scalars"]
    lines += [f"scalar {tag} is in one record only" for tag in sorted(old.keys() ^ new.keys())]
    for tag in sorted(old.keys() & new.keys()):
        if old[tag] != new[tag]:
            pairs = zip(old[tag], new[tag], strict=False)
            first = next((pair for pair in pairs if pair[0] != pair[1]), (len(old[tag]), len(new[tag])))
            lines.append(f"scalar {tag} differs: {first[0]} and {first[1]} ([step, value])")
    return lines


def _scalars(run: Path) -> dict[str, list[list[float]]]:
    accumulator = EventAccumulator(str(run), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {
        tag: [[event.step, event.value] for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
        if not tag.startswith(_CLOCK)
    }


def _hash_completions(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.glob("step_*.parquet")):
        digest.update(json.dumps(pq.read_table(file).to_pylist(), sort_keys=True).encode())
    return digest.hexdigest()


def _hash_weights(checkpoint: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(checkpoint, weights_only=True)["state_dict"].items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    """Read the command line and record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run and record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--runs", nargs="*", choices=list(RUNS), default=list(RUNS), help="all by default")
    comparing = commands.add_parser("compare", help="compare two records")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    given = parser.parse_args()
    if given.command == "record":
        with ThreadPoolExecutor(2) as pool:  # one thread per run, two runs on two cores
            found = list(pool.map(lambda name: record(name, RUNS[name]), given.runs))
        given.out.write_text(json.dumps(dict(zip(given.runs, found, strict=True))))
        return
    before, after = json.loads(given.before.read_text()), json.loads(given.after.read_text())
    common = [name for name in before if name in after]
    changed = {name: lines for name in common if (lines := differences(before[name], after[name]))}
    for name, lines in changed.items():
        print(f"{name}:", *lines, sep="\n  ")
    print(f"{len(common) - len(changed)} of {len(common)} runs are bitwise the same")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
