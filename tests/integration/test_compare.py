"""`dots compare` as it is typed: two arms, two seeds, killed in the middle, continued, and with other settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.command import ROOT, command, dots

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]

MICRO = {
    "checkpoint": {"every": 1},
    "trainer": {"max_steps": 6},
    "model": {
        "class_path": "app.module.GRPOModule",
        "init_args": {
            "mini_batches": 1,
            "sampling": {"num_generations": 8, "max_completion_length": 48},
            "val_sampling": {"num_generations": 4, "max_completion_length": 48},
        },
    },
    "data": {
        "class_path": "datamodules.online.OnlinePromptDataModule",
        "init_args": {"prompts_per_step": 8, "val_size": 16},
    },
}


def kill_only_the_comparison(sign: Path, arguments: list[str]) -> None:
    """SIGKILL `dots compare` alone as soon as a file is there; its run is left to end on its own."""
    process = subprocess.Popen(command(*arguments), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    try:
        while not sign.exists():
            assert process.poll() is None and time.monotonic() < deadline, f"no {sign}"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()


Accounts = dict[tuple[str, int], dict[str, Any]]


def test_a_comparison_is_killed_and_continues(tmp_path: Path) -> None:
    (tmp_path / "micro.yaml").write_text(yaml.safe_dump(MICRO))
    out = tmp_path / "out"
    arguments = [
        "compare", "--base", "configs/quickstart.yaml", str(tmp_path / "micro.yaml"),
        "--arms", "grpo=configs/arms/grpo.yaml", "rr=configs/arms/rr.yaml",
        "--seeds", "0", "1", "--smooth", "1", "--out", str(out),
    ]  # fmt: skip
    every = ["--evaluate_every", "2"]
    killed = out / "runs" / "rr" / "seed_0"
    kill_only_the_comparison(killed / "version_0" / "checkpoints" / "step_00000001.ckpt", [*arguments, *every])
    first = out / "runs" / "grpo" / "seed_0" / "version_0" / "summary.json"
    finished_at = first.stat().st_mtime_ns
    assert json.loads(first.read_text())["completed"] is True

    done = dots(*arguments, *every, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert first.stat().st_mtime_ns == finished_at
    assert "grpo seed 0:" not in done.stderr and "rr seed 1:" in done.stderr
    # The killed run resumed in its own folder, from what it saved when it was asked to end.
    assert [path.name for path in killed.glob("version_*")] == ["version_0"]
    assert "stopped by SIGTERM" in (killed / "log.txt").read_text(errors="replace")

    accounts = accounts_of(out)
    assert_arms_had_their_budgets(accounts)
    assert_report_says_what_the_runs_say(out, accounts)
    assert_other_settings_are_refused([*arguments, "--evaluate_every", "3"])


def accounts_of(out: Path) -> Accounts:
    """`summary.json` of every run, by arm and seed."""
    return {
        (name, seed): json.loads((out / "runs" / name / f"seed_{seed}" / "version_0" / "summary.json").read_text())
        for name in ("grpo", "rr")
        for seed in (0, 1)
    }


def assert_arms_had_their_budgets(accounts: Accounts) -> None:
    for (name, seed), account in accounts.items():
        assert account["completed"] is True
        steps = [one["step"] for one in account["evaluations"]]
        assert steps == list(range(0, steps[-1] + 1, 2))
        if name == "grpo":
            # Two steps of eight prompts, eight completions each.
            assert account["evaluations"][1]["completions"] == 128
        else:
            # It had the baseline's clock, or four times its steps, and stopped at the next evaluation.
            clock = accounts["grpo", seed]["training_seconds"]
            assert account["training_seconds"] >= clock or steps[-1] == 24
            assert account["evaluations"][-2]["seconds"] < clock
            assert account["completions"] < 64 * account["steps"]
    # Held-out prompts go by the seed, not by the arm.
    held_out = {key: account["validation_prompts"] for key, account in accounts.items()}
    assert held_out["grpo", 0] == held_out["rr", 0] != held_out["grpo", 1]


def assert_report_says_what_the_runs_say(out: Path, accounts: Accounts) -> None:
    figures = json.loads((out / "compare.json").read_text())
    found = figures["arms"]["rr"]
    assert figures["setting"]["missing"] == []
    assert found["final_accuracy"]["per_seed"]["1"] == accounts["rr", 1]["evaluations"][-1]["accuracy"]
    assert found["totals"]["completions"] == (accounts["rr", 0]["completions"] + accounts["rr", 1]["completions"]) / 2
    assert any("RolloutReplay" in line for line in figures["setting"]["differences"]["rr"])
    assert found["time_ratio"]["reached"] + found["time_ratio"]["censored"] + found["time_ratio"]["undefined"] == 2
    assert (out / "compare.html").stat().st_size > 10_000

    again = dots("compare", "--report", str(out))
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((out / "compare.json").read_text()) == figures


def assert_other_settings_are_refused(arguments: list[str]) -> None:
    other = dots(*arguments)
    assert other.returncode == 2
    lines = other.stderr.splitlines()
    assert [line for line in lines if line.startswith("dots: error:")] == lines[-1:]
    assert "val_check_interval: 2 -> 3" in other.stderr
