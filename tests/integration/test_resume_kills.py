"""SIGKILL at random moments of every phase of a step, again and again: the run ends as if never stopped.

`make test-resume` kills ten small steps of the quickstart 6 times; `make test-resume KILLS=20 FULL=1` two whole
quickstarts, of different seeds, 20 times each.
"""

from __future__ import annotations

import json
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.command import EVERY_STEP, assert_same_run, dots, fit_arguments, run_of

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
        if not saved and done.returncode:
            # Killed before its first checkpoint: it begins again, as a new run.
            run_of(broken).rename(tmp_path / f"nothing_{len(log)}")
        if done.returncode == 0:
            break
    print(f"seed {seed}:", *log, sep="\n  ")
    assert not survived, "the run ended before its last kill: lower KILLS"
    done = dots(*arguments(broken), "--ckpt_path=last", timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same_run(broken, straight)
