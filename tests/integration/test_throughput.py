"""The throughput benchmark with the real trainers, each in its process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORK = ["--prompts=4", "--num_generations=4", "--completion_length=8", "--threads=1", "--warmup=0", "--pairs=2"]


def throughput(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.benchmarks.throughput", "--against=trl", f"--out={out}", *WORK, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
@pytest.mark.long
def test_both_do_the_same_work_in_turn(tmp_path: Path) -> None:
    done = throughput(tmp_path, "--cases=half_informative")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert [pair["case"] for pair in found["pairs"]] == ["half_informative"] * 2
    for pair in found["pairs"]:
        for side in (pair["dots"], pair["trl"]):
            assert side["completion_tokens"] == 4 * 4 * 8
            assert 0 < side["rollout"] + side["update"] < side["seconds"]
    ratios = sorted(pair["dots"]["seconds"] / pair["trl"]["seconds"] for pair in found["pairs"])
    assert found["ratio"]["half_informative"] == pytest.approx(sum(ratios) / 2)
    assert "Dots / TRL" in done.stdout


@pytest.mark.long
def test_a_policy_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = throughput(tmp_path, "--policy=nowhere/policy")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere/policy" in done.stderr
