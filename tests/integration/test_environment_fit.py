"""Training in an environment: by config, through kills and resumes, on several ranks, with tools that hang."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from app.reporting.curves import read_scalars
from datamodules.ledger import STEP_PHASES
from tests.integration.test_resume_kills import KILLER, KILLS, kills
from tests.support.command import (
    EVERY_STEP,
    Done,
    assert_same_run,
    dots,
    dots_on_ranks,
    fit_arguments,
    logged,
    run_of,
    scalars,
)
from tests.support.refusal import Place, model, write_pool

pytestmark = pytest.mark.slow
COUNTING = "tests/support/counting.yaml"


def arguments(folder: Path, *more: str) -> list[str]:
    """Ten small steps of DOTS + RR in the environment."""
    return fit_arguments(folder, "--config", COUNTING, *more)


def completions(folder: Path, step: int) -> list[dict]:
    return pq.read_table(run_of(folder) / "completions" / f"step_{step:08d}.parquet").to_pylist()


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    succeeded(dots(*arguments(folder, EVERY_STEP)))
    return folder


def succeeded(done: Done) -> Done:
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_run_in_an_environment_trains_on_conversations(straight: Path) -> None:
    rows = completions(straight, 0)
    conversations = [json.loads(row["turns"]) for row in rows]
    assert max(map(len, conversations)) == 7  # four turns and three replies
    for row, messages in zip(rows, conversations, strict=True):
        total, added = None, 0
        for message in messages:
            if message["role"] == "tool" and message["content"].isdigit():
                total, added = int(message["content"]), added + 1
        if total is not None and row["finish_reason"] == "stop":
            assert row["reward"] == float(total % 2 == 0)
    curves = scalars(straight)
    assert sorted(curves["tools/call_frequency"]) == list(range(10))
    calls = sum(len(message.get("tool_calls", ())) for messages in conversations for message in messages)
    assert calls > 20
    assert all(0 < value < 4 for value in list(curves["tools/call_frequency"].values())[:3])
    assert set(curves["environment/failed"].values()) == {0.0}
    assert all(np.isfinite(value) for value in curves["loss"].values())
    assert all(value > 0 for value in curves["grad_norm"].values())
    account = json.loads((run_of(straight) / "summary.json").read_text())["seconds"]
    clocks = {name: values for name, (_, values) in read_scalars(run_of(straight)).items()}
    waited = clocks["time/environment"]
    assert min(waited) > 0 and account["environment"] == pytest.approx(sum(waited), abs=0.01)
    phases = zip(*(clocks[f"time/{phase}"] for phase in STEP_PHASES), strict=True)
    for parts, seconds in zip(phases, clocks["step_time"], strict=True):
        assert min(parts) >= 0 and sum(parts) <= seconds
    # Validation, in the same environment.
    assert sorted(curves["val/environment/turns"]) == sorted(curves["val/accuracy"])
    assert all(1 <= turns <= 4 for turns in curves["val/environment/turns"].values())
    assert all(0 < calls < 4 for calls in curves["val/tools/call_frequency"].values())
    assert set(curves["val/environment/failed"].values()) == {0.0}
    # The engine's log-probabilities are those of the policy; later steps replay.
    assert curves["sampling/sampling_logp_difference/max"][0] < 5e-5


def test_a_resumed_run_is_the_run_that_was_not_stopped(straight: Path, tmp_path: Path) -> None:
    succeeded(dots(*arguments(tmp_path, EVERY_STEP, "--trainer.max_steps=4")))
    succeeded(dots(*arguments(tmp_path, EVERY_STEP, "--ckpt_path=last")))
    assert_same_run(tmp_path, straight)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_in_every_phase_ends_as_if_never_stopped(straight: Path, tmp_path: Path, seed: int) -> None:
    (tmp_path / "dots_killer.py").write_text(KILLER)
    account = json.loads((run_of(straight) / "summary.json").read_text())
    killed = 0
    for kill in kills(seed, account["seconds"], account["steps"]):
        done = dots(*arguments(tmp_path, EVERY_STEP, "--ckpt_path=last", kill.option), path=tmp_path)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr[-2000:]
        killed += done.returncode == -signal.SIGKILL
        if done.returncode == 0:
            break
    assert killed == KILLS
    succeeded(dots(*arguments(tmp_path, EVERY_STEP, "--ckpt_path=last")))
    assert_same_run(tmp_path, straight)


@pytest.mark.ranks
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.long)])
def test_two_ranks_hold_the_conversations_of_one(straight: Path, tmp_path: Path, strategy: str) -> None:
    ranks = (f"--config=configs/strategy/{strategy}.yaml", "--trainer.devices=2", "--trainer.max_steps=2")
    for done in dots_on_ranks(2, *arguments(tmp_path, *ranks)):
        succeeded(done)
    told = ("prompt_id", "completion", "turns", "reward", "finish_reason")
    ours, theirs = (
        sorted(tuple(row[name] for name in told) for row in completions(folder, 0)) for folder in (tmp_path, straight)
    )
    assert ours == theirs


def test_a_tool_that_hangs_costs_its_time_limit_and_one_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOTS_TEST_SLOW_ENVIRONMENT", "7 =")  # some of the sums
    done = succeeded(
        dots(
            *arguments(tmp_path, "--trainer.max_steps=2", "--model.environment.init_args.time_limit_s=0.5"), fresh=True
        )
    )
    assert "time_limit_s=0.5" in done.stderr
    curves = scalars(tmp_path)
    failed = sum(curves["environment/failed"].values())
    assert failed >= 1
    assert all(np.isfinite(value) for value in curves["loss"].values())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capsys)


TRL_EXAMPLE = '''
class IncrementEnvironment:
    """An environment as TRL documents them: counts up, and is rewarded for the count."""

    def reset(self, **kwargs) -> str | None:
        self.counter = 0

    def increment(self, step: int) -> int:
        """
        Increment the internal counter.

        Args:
            step: The value to add to the counter.

        Returns:
            The updated counter value.
        """
        self.counter += int(step or 1)
        return self.counter


def reward_func(environments, **kwargs) -> list[float]:
    return [float(environment.counter) for environment in environments]
'''


def test_the_example_of_trl_trains_by_config_alone(place: Place) -> None:
    (place.path / "increment.py").write_text(TRL_EXAMPLE)
    plain = {"start": "1", "end": "=", "tool": "increment", "argument": "step", "reply": "{content}"}
    place.config(
        lambda config: model(config).update(
            environment={
                "class_path": "app.environments.Tools",
                "init_args": {"factory": "increment.py:IncrementEnvironment", "protocol": plain},
            },
            rewards="increment.py:reward_func",
            sampling={"num_generations": 4, "max_completion_length": 40},
        )
    )
    run, _ = place.fit("runs", 5)
    assert len(logged(run)["reward"]) == 5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"factory": "nowhere.py:Env"}, "nowhere.py"),
        ({"factory": "broken.py:Env", "protocol": {"start": "a", "end": "b", "tool": "t", "argument": "x"}}, "broken"),
        ({"factory": "increment.py:IncrementEnvironment"}, "model.environment.protocol"),
        ({"factory": "increment.py:IncrementEnvironment", "max_turns": 0}, "model.environment.max_turns is 0"),
    ],
)
def test_environments_that_cannot_work_are_refused_in_one_line(
    place: Place, given: dict[str, object], said: str
) -> None:
    (place.path / "increment.py").write_text(TRL_EXAMPLE)
    (place.path / "broken.py").write_text("raise RuntimeError('no such world')")
    chosen = {"class_path": "app.environments.Tools", "init_args": given}
    place.config(lambda config: model(config).update(environment=chosen))
    code, told = place.run("fit", "--config", "run.yaml")
    assert code == 2
    lines = [line for line in told.splitlines() if line.strip()]
    assert said in lines[-1]
    assert not os.path.exists("runs")


def test_a_missing_get_reward_is_refused_before_anything_is_generated(place: Place) -> None:
    scoring = "    def get_reward(self):\n        return float(self.counter)\n\n\ndef reward_func"
    (place.path / "increment.py").write_text(TRL_EXAMPLE)
    (place.path / "scoring.py").write_text(TRL_EXAMPLE.replace("def reward_func", scoring))
    plain = {"start": "1", "end": "=", "tool": "increment", "argument": "step"}
    chosen: dict[str, Any] = {"class_path": "app.environments.Tools"}
    without, having = "increment.py:IncrementEnvironment", "scoring.py:IncrementEnvironment"

    doctor, named = ("doctor", "--config", "run.yaml"), {"first": without, "second": having}

    def told(factory: object, *command: str) -> tuple[int, list[str]]:
        """Return the exit code, and the lines about the reward."""
        chosen["init_args"] = {"factory": factory, "protocol": plain}
        place.config(lambda config: model(config).update(environment=chosen, rewards="environment"))
        code, out, said = place.run_with_output(*command)
        return code, [line for line in (out + said).splitlines() if "eward 'env" in line or "rewards: env" in line]

    rows = [{"question": f"{n} + 1 =", "answer": str(n + 1), "environment": "first"} for n in range(8)]
    write_pool(place.path / "pool.jsonl", rows)
    for command, code in ((("fit", "--config", "run.yaml"), 2), (("fit", "--config", "run.yaml", "--dry_run"), 2)):
        found, (line,) = told(without, *command)
        assert found == code
        assert line == (
            "dots: error: Reward 'environment' is what the environment's get_reward returns, but the environment has "
            "no get_reward. Give it one, or choose rewards that score the conversation."
        )
    assert not os.path.exists("runs")
    code, (line,) = told(named, *doctor)
    assert code == 1 and "the environment 'first', which prompts of data.train name, has no get_reward" in line
    # One that no prompt names needs none.
    for factory in (having, {"first": having, "second": without}):
        assert "environment read the answers" in told(factory, *doctor)[1][0]


def test_rollouts_ahead_are_refused(place: Place) -> None:
    (place.path / "increment.py").write_text(TRL_EXAMPLE)
    plain = {"start": "1", "end": "=", "tool": "increment", "argument": "step"}

    def change(config: dict) -> None:
        model(config)["environment"] = {
            "class_path": "app.environments.Tools",
            "init_args": {"factory": "increment.py:IncrementEnvironment", "protocol": plain},
        }
        config["trainer"]["callbacks"] += [
            {"class_path": "callbacks.RolloutAhead", "init_args": {"staleness": 2, "partial_rollout_tokens": 2}}
        ]

    place.config(change)
    code, told = place.run("fit", "--config", "run.yaml")
    assert (code, "model.environment is set" in told) == (2, True)


def test_an_environment_that_always_fails_ends_the_run(place: Place) -> None:
    (place.path / "increment.py").write_text(TRL_EXAMPLE.replace("self.counter = 0", "self.counter = 1 / 0"))
    plain = {"start": "1", "end": "=", "tool": "increment", "argument": "step"}
    chosen = {"factory": "increment.py:IncrementEnvironment", "protocol": plain}
    place.config(
        lambda config: model(config).update(
            environment={"class_path": "app.environments.Tools", "init_args": chosen},
            rewards="increment.py:reward_func",
        )
    )
    code, told = place.run("fit", "--config", "run.yaml")
    assert code == 2
    assert "the environment failed in all 4 conversations" in told and "ZeroDivisionError" in told


@pytest.mark.parametrize(
    "command",
    [
        ("select", "--config", "run.yaml", "--method", "ufo", "--keep", "2", "--out", "s.jsonl"),
        ("worth", "--base", "run.yaml", "--out", "w"),
    ],
)
def test_studies_of_single_turns_are_refused(place: Place, command: tuple[str, ...]) -> None:
    (place.path / "increment.py").write_text(TRL_EXAMPLE)
    plain = {"start": "1", "end": "=", "tool": "increment", "argument": "step"}
    chosen = {"factory": "increment.py:IncrementEnvironment", "protocol": plain}
    place.config(
        lambda config: model(config).update(environment={"class_path": "app.environments.Tools", "init_args": chosen})
    )
    assert f"dots {command[0]} measures single turns, but model.environment is set" in place.refused(*command)
