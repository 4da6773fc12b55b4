"""`configs/strategy/slurm.sh` as SLURM would run it, with stand-ins for `srun` and `scontrol` and real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_ranks import arguments, assert_same_choices_and_updates, succeeded, weights_of
from tests.support.command import EVERY_STEP, ROOT, dots, run_of, scalars

pytestmark = [pytest.mark.slow, pytest.mark.ranks, pytest.mark.long, pytest.mark.timeout(900)]

SRUN = """#!{python}
# Two tasks with the variables that srun gives them. When the file of a step is there they get SIGTERM, as from
# `#SBATCH --signal=TERM@...`; $WHEN names it, and nothing comes once it was there before.
import os, signal, subprocess, sys, time
command = [token for token in sys.argv[1:] if not token.startswith("--kill-on-bad-exit")]
base = dict(os.environ, SLURM_NTASKS="2", SLURM_NODELIST="127.0.0.1")
tasks = [
    subprocess.Popen(command, env=base | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "SLURM_NODEID": "0"}})
    for n in range(2)
]
sign = os.environ["WHEN"]
due = not os.path.exists(sign)
while any(task.poll() is None for task in tasks):
    if due and os.path.exists(sign):
        due = False
        for task in tasks:
            task.send_signal(signal.SIGTERM)
    time.sleep(0.02)
sys.exit(max(abs(task.returncode) for task in tasks))
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$REQUEUED"\n'


def submit(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """The script, once, from start to end."""
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (folder / "bin").mkdir(exist_ok=True)
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    (folder / "bin" / "dots").write_text(f'#!/bin/bash\nexec {sys.executable} -m app "$@"\n')
    (folder / "bin" / "dots").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "NAME": "quickstart",
        "RUNS": str(folder), "DOTS": str(folder / "bin" / "dots"), "REQUEUED": str(folder / "requeued"),
        "WHEN": str(run_of(folder) / "completions" / "step_00000001.parquet"), "SLURM_JOB_ID": "4242",
        "SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "dots",
    }  # fmt: skip
    return subprocess.run(
        ["bash", "configs/strategy/slurm.sh", *more], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=400,
    )  # fmt: skip


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_requeued_job_goes_on_as_if_never_stopped(tmp_path: Path, strategy: str) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeded([dots(*arguments(whole, 1, EVERY_STEP, strategy=None))])
    given = arguments(parts, 2, EVERY_STEP, strategy=strategy)[1:]
    first = submit(parts, *given)
    assert first.returncode == 0, first.stderr[-2000:]
    assert (parts / "requeued").read_text() == "requeue 4242\n"
    assert json.loads((run_of(parts) / "summary.json").read_text())["completed"] is False
    assert 2 <= len(scalars(parts)["loss"]) < 6
    second = submit(parts, *given)
    assert second.returncode == 0, second.stderr[-2000:]
    assert "completed: " in second.stdout and (parts / "requeued").read_text() == "requeue 4242\n"
    assert not run_of(parts).with_name("version_1").exists()
    assert_same_choices_and_updates(parts, whole)
    assert set(weights_of(parts)) == set(weights_of(whole))


def test_a_run_that_fails_is_not_requeued(tmp_path: Path) -> None:
    done = submit(tmp_path, *arguments(tmp_path, 2, "--model.mini_batches=8")[1:])
    assert done.returncode == 2
    assert "2 processes (trainer.devices x trainer.num_nodes) and data.prompts_per_step=8" in done.stderr
    assert not (tmp_path / "requeued").exists()
