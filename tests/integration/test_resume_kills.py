"""SIGKILL at random moments of every phase of a step, again and again: the run ends as if never stopped.

`make test-resume` kills ten small steps of the quickstart 6 times, and a few steps of every selector with every kind of
logger; `make test-resume KILLS=20 FULL=1` two whole quickstarts, of different seeds, 20 times each.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.support.command import EVERY_STEP, assert_same_run, dots, fit_arguments, logged, run_of
from tests.support.refusal import BASE, write_pool

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("DOTS_TEST_KILLS", "6"))
FULL = os.environ.get("DOTS_TEST_FULL", "") not in ("", "0")
PHASES = ("select", "rollout", "reward", "update", "sync", "checkpoint")
KILLER = '''
import contextlib, os, signal, threading
from lightning.pytorch import Callback
from callbacks.upkeep.checkpoint import RunCheckpoint
from datamodules.ledger import Ledger

class Killer(Callback):
    """Kills its process a while after a phase has begun for the n-th time of a training step."""
    def __init__(self, phase: str, count: int, delay: float):
        self.phase, self.left, self.delay = phase, count, delay

    def on_train_start(self, trainer, pl_module):
        ours, timed, save = self, Ledger.phase, RunCheckpoint._save

        @contextlib.contextmanager
        def phase(ledger, name):
            ours.begins(name)
            with timed(ledger, name):
                yield

        def saving(checkpoint, *rest):
            if checkpoint._due is not None:
                ours.begins("checkpoint")
            save(checkpoint, *rest)

        Ledger.phase, RunCheckpoint._save = phase, saving

    def begins(self, name):
        self.left -= name == self.phase
        if self.left == 0 and name == self.phase:
            timer = threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
'''


@dataclass(frozen=True)
class Kill:
    """When a life of the run ends: `delay` seconds after the phase has begun for the `count`-th time."""

    phase: str
    count: int
    delay: float

    @property
    def option(self) -> str:
        arguments = json.dumps({"phase": self.phase, "count": self.count, "delay": self.delay})
        return f'--trainer.callbacks+={{"class_path":"dots_killer.Killer","init_args":{arguments}}}'


def kills(seed: int, seconds: dict[str, float], steps: int) -> list[Kill]:
    """`KILLS` of them, over all phases, at random moments of their usual length; far enough apart to get on."""
    draw = random.Random(seed)
    phases = [PHASES[number % len(PHASES)] for number in range(KILLS)]
    draw.shuffle(phases)
    most = max(1, steps // KILLS)
    return [Kill(phase, draw.randint(1, most), draw.uniform(0, seconds[phase] / steps)) for phase in phases]


@pytest.mark.parametrize("seed", [0, 1] if FULL else [0])
def test_a_run_killed_in_every_phase_ends_as_if_never_stopped(tmp_path: Path, seed: int) -> None:
    (tmp_path / "dots_killer.py").write_text(KILLER)
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def arguments(folder: Path) -> list[str]:
        if not FULL:
            return [*fit_arguments(folder, EVERY_STEP), f"--seed_everything={seed}"]
        return ["fit", "--config", "configs/quickstart.yaml", EVERY_STEP, f"--seed_everything={seed}",
                f"--trainer.logger.save_dir={folder}"]  # fmt: skip

    done = dots(*arguments(straight), timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    account = json.loads((run_of(straight) / "summary.json").read_text())
    survived, log = 0, []
    for kill in kills(seed, account["seconds"], account["steps"]):
        done = dots(*arguments(broken), "--ckpt_path=last", kill.option, path=tmp_path, timeout=3000)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        survived += done.returncode == 0
        saved = sorted((run_of(broken) / "checkpoints").glob("step_*.ckpt"))
        log.append(
            f"{kill.phase} {kill.count} after {kill.delay:.3f} s: {saved[-1].stem if saved else 'nothing saved'}"
        )
        if done.returncode == 0:
            break
    print(f"seed {seed}:", *log, sep="\n  ")
    assert not survived, "the run ended before its last kill: lower KILLS"
    done = dots(*arguments(broken), "--ckpt_path=last", timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(broken, straight)


# --- Every selector, with every kind of logger -----------------------------------------------------------------------

SELECTORS: dict[str, dict[str, object]] = {
    "Uniform": {}, "Dots": {}, "Greso": {}, "Mopps": {}, "Dps": {}, "Pools": {}, "Posterior": {"temperature": 1.0},
    "Aligned": {},
    "Composed": {
        "ranker": {"class_path": "datamodules.selectors.Mopps"},
        "filters": [{"class_path": "datamodules.selectors.ZeroVarianceSkip"}],
        "cool_down": 1, "explore": 0.25,
    },
}  # fmt: skip
TENSORBOARD = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger", "init_args": {"save_dir": "tb"}}
ROWS = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "rows"}}
LOGGERS: dict[str, object] = {"tensorboard": TENSORBOARD, "csv": ROWS, "list": [ROWS, TENSORBOARD], "false": False}
REWARD = """
def digits(completions, **rest):
    return [float(sum(map(str.isdigit, one)) % 2) for one in completions]
"""
STEPS = 5


def small_run(folder: Path, selector: str, logger: str) -> None:
    """Write the config and data of a run of `STEPS` steps with reference rollouts, replay and validation."""
    folder.mkdir()
    write_pool(folder / "pool.jsonl", [{"question": f"{i} + {i % 5} =", "answer": str(i)} for i in range(24)])
    config = json.loads(json.dumps(BASE))
    config["trainer"].update(max_steps=STEPS, val_check_interval=2, logger=LOGGERS[logger])
    config["trainer"]["callbacks"] = [
        {"class_path": "callbacks.ReferenceRollouts", "init_args": {"size": 4, "every": 2}},
        {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 8}},
        {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1}},
    ]
    config["model"]["init_args"].update(
        rewards=[{"class_path": "app.rewards.Function", "init_args": {"path": "dots_digits.digits"}}],
        optimization={"learning_rate": 1e-3},
    )
    config["model"]["init_args"]["sampling"]["max_completion_length"] = 6
    chosen = {"class_path": f"datamodules.selectors.{selector}", "init_args": SELECTORS[selector]}
    config["data"]["init_args"].update(prompts_per_step=4, val_size=4, selector=chosen)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


def left_by(folder: Path) -> tuple[dict[str, torch.Tensor], object]:
    """Return the weights and the metrics that the only run below a folder has left, but not its times."""
    (run,) = (path.parent for path in folder.rglob("run.json"))
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    rows: list[dict[str, str]] = []
    if (run / "metrics.csv").exists():
        with (run / "metrics.csv").open(newline="") as file:
            rows = [
                {
                    name: value
                    for name, value in row.items()
                    if value and not name.startswith(("time/", "step_time", "tok"))
                }
                for row in csv.DictReader(file)
            ]
    summary = json.loads((run / "summary.json").read_text())
    counts = {
        name: value for name, value in summary.items()
        if name not in ("seconds", "training_seconds", "config_sha256", "evaluations")
    }  # fmt: skip
    evaluations = [(one["step"], one["accuracy"], one["completions"]) for one in summary["evaluations"]]
    return weights, (logged(run), rows, counts, evaluations)


@pytest.mark.parametrize("logger", LOGGERS)
@pytest.mark.parametrize("selector", SELECTORS)
def test_every_selector_and_logger_resumes(tmp_path: Path, selector: str, logger: str) -> None:
    (tmp_path / "dots_killer.py").write_text(KILLER)
    (tmp_path / "dots_digits.py").write_text(REWARD)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    small_run(straight, selector, logger)
    shutil.copytree(straight, broken)
    command = ("fit", "--config", "run.yaml")
    done = dots(*command, cwd=straight, path=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    weights, metrics = left_by(straight)
    draw = random.Random(f"{selector} {logger}")
    for number in range(3):
        kill = Kill(draw.choice(PHASES), draw.randint(1, 2), draw.uniform(0, 0.1))
        done = dots(*command, "--ckpt_path=last", kill.option, cwd=broken, path=tmp_path)
        assert done.returncode in (0, -signal.SIGKILL), f"{number} {kill}: {done.stderr[-2000:]}"
    done = dots(*command, "--ckpt_path=last", cwd=broken, path=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    found, others = left_by(broken)
    assert all(torch.equal(tensor, found[name]) for name, tensor in weights.items())
    assert others == metrics
