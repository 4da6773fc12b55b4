"""What a new user types: short commands, short names and everything that the command says about itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from app.reporting.curves import read_scalars
from tests.support.refusal import ROOT, TINY, Place, files

SMALL = (
    "--trainer.accelerator=cpu", "--trainer.devices=1", "--data.prompts_per_step=4", "--data.cache_dir=cache",
    "--model.sampling.num_generations=2", "--model.sampling.max_completion_length=3",
)  # fmt: skip
SHORTEST = ("fit", f"--model.policy.path={TINY}", "--data.train.path=pool.jsonl")
MINE = """
def is_right(completions, answer, **_):
    return [float(text.strip() == gold) for text, gold in zip(completions, answer)]

def long(completions):
    return [float(len(text) > 1000) for text in completions]

def above(completions, least=1000, **_):
    return [float(len(text) > least) for text in completions]

class Judge:
    def __init__(self, least=1000):
        self.least = least

    def __call__(self, completions, **_):
        return [float(len(text) > self.least) for text in completions]
"""
BARE = """
from app.rewards import Reward

class Bare(Reward):
    def __init__(self):
        pass

    def __call__(self, completions, **_):
        return [1.0 for _ in completions]
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Place:
    return Place.at(tmp_path, monkeypatch, capfd)


def summary(place: Place) -> dict:
    """Return summary.json of the newest run."""
    newest = max(place.path.rglob("summary.json"), key=lambda one: one.stat().st_mtime)
    return json.loads(newest.read_text())


def test_the_shortest_command_trains_once_over_the_prompts(place: Place) -> None:
    code, said = place.run(*SHORTEST, "--model.rewards=math", *SMALL)
    assert code == 0, said
    assert summary(place)["steps"] == 2  # 8 prompts, 4 per step
    config = yaml.safe_load((place.path / "lightning_logs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["rewards"] == "math"


def test_rewards_by_short_names_functions_files_and_classes(place: Place) -> None:
    (place.path / "mine.py").write_text(MINE)
    (place.path / "bare.py").write_text(BARE)
    listed = [
        "numeric", "mine.is_right", "mine.py:long", "mine.Judge", "bare.Bare",
        "{class_path: Function, init_args: {path: mine.above, kwargs: {least: -1}}}",
        "{class_path: Function, init_args: {path: mine.Judge, kwargs: {least: -1}, name: lenient}}",
    ]  # fmt: skip
    code, said = place.run(*SHORTEST, f"--model.rewards=[{', '.join(listed)}]", *SMALL, "--trainer.max_steps=1")
    assert code == 0, said
    logged = read_scalars(place.path / "lightning_logs" / "version_0")
    means = {name: logged[f"rewards/{name}/mean"][1][0] for name in ("long", "Judge", "bare", "above", "lenient")}
    # No completion of three tokens has a thousand characters, each has more than -1.
    assert means == {"long": 0.0, "Judge": 0.0, "bare": 1.0, "above": 1.0, "lenient": 1.0}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Numerik", "no reward of this name is known; did you mean 'Numeric'?"),
        ("absent.py:is_right", "there is no file absent.py"),
        ("format", "model.rewards=Format needs pattern. Write it as {class_path: app.rewards.Format"),
        ("[math, absent.f]", "there is no module 'absent' on the Python path"),
    ],
)
def test_a_reward_that_does_not_exist_is_refused(place: Place, given: str, expected: str) -> None:
    assert expected in place.refused(*SHORTEST, f"--model.rewards={given}", *SMALL)


def test_a_run_folder_stands_for_its_config_and_checkpoint(place: Place) -> None:
    assert place.run("train", *SHORTEST[1:], "--model.rewards=math", *SMALL, "--trainer.max_steps=1")[0] == 0
    run = "lightning_logs/version_0"
    code, said = place.run("fit", "--resume", run, "--trainer.max_steps=2")
    assert code == 0, said
    assert summary(place)["steps"] == 2
    assert not (place.path / "lightning_logs" / "version_1").exists()
    code, said = place.run("export", run, "--out", "exported")
    assert code == 0, said
    assert (place.path / "exported" / "model.safetensors").is_file()
    assert "has no adapters" in place.refused("export", run, "--out", "adapters", "--adapter", "true")
    assert "no such folder" in place.refused("export", "runs/absent", "--out", "other")


def test_a_dry_run_keeps_nothing_and_the_data_are_shown(place: Place) -> None:
    before = files(place.path)
    rewards = ("--model.rewards=numeric", *SMALL)
    code, out, said = place.run_with_output(*SHORTEST, *rewards, "--dry_run")
    assert code == 0, said
    assert "dry run: ok in" in out and "Nothing was kept." in out and "4 groups of 2 completions" in out
    assert "GPU available" not in said and "Seed set" not in said
    code, out, said = place.run_with_output("data", *SHORTEST[1:], *rewards)
    assert code == 0, said
    assert "8 rows read, 8 prompts kept" in out and "numeric sees answer='1'" in out
    assert files(place.path) == before


def test_help_and_version_load_nothing_heavy() -> None:
    show = "import sys; from app.cli.entry import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    for argument, expected in (("--help", "  fit         train a policy (also: dots train)"), ("--version", "dots ")):
        done = subprocess.run([sys.executable, "-c", show, argument], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


def test_init_writes_a_config_that_trains_and_overwrites_nothing(place: Place) -> None:
    given = ("--data", "pool.jsonl", "--model", str(TINY))
    (place.path / "run.yaml").unlink()
    code, out, said = place.run_with_output("init", *given)
    assert code == 0, said
    assert "pool.jsonl (question -> answer): 8 rows read, 7 prompts kept, 1 held out for validation" in out
    assert out.count("as the policy reads it") == 3 and "ground_truth='8'" in out
    assert "wrote run.yaml and my_rewards.py. Next: dots fit --config run.yaml" in out
    config = (place.path / "run.yaml").read_text()
    assert len(config.splitlines()) <= 15
    code, said = place.run("fit", "--config", "run.yaml", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
                           "--model.sampling.max_completion_length=3", "--data.cache_dir=cache")  # fmt: skip
    assert code == 0, said
    assert "run.yaml exists, and dots init overwrites nothing" in place.refused("init", *given)
    assert (place.path / "run.yaml").read_text() == config
    line = place.refused("init", *given, "--out", "other.yaml")
    assert "my_rewards.py exists" in line and "name your function in it: --reward my_rewards.py:is_right" in line
    line = place.refused("init", *given, "--out", "other.yaml", "--reward", "my_rewards.py:is_rite")
    assert "has no 'is_rite'; did you mean 'is_right'?" in line
    (place.path / "nested.jsonl").write_text(
        '{"row": {"q": "1 + 1 =", "a": 2}}\n' * 2 + '{"row": {"q": "2 =", "a": 2}}\n'
    )
    columns = ("--prompt_column", "row.q", "--answer_column", "row.a", "--reward", "numeric", "--out", "other.yaml")
    code, out, said = place.run_with_output("init", "--data", "nested.jsonl", "--model", str(TINY), *columns)
    assert code == 0, said
    assert "nested.jsonl (row.q -> row.a): 3 rows read" in out and "numeric sees answer=2" in out


def test_a_failed_init_leaves_nothing(place: Place) -> None:
    (place.path / "run.yaml").unlink()
    given = ("--data", "pool.jsonl", "--model", str(TINY))
    assert "nowhere.py" in place.refused("init", *given, "--reward", "nowhere.py:is_right")
    assert "no_such_file" in place.refused("init", "--data", "no_such_file.jsonl", "--model", str(TINY))
    assert "no/model" in place.refused("init", "--data", "pool.jsonl", "--model", "no/model")
    assert "--data" in place.refused("init", "--model", str(TINY))
