"""Files in the user's folder that have the names of modules that Dots or its libraries import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from app.import_path import hidden_files, import_path, put_user_folder_last
from tests.support.command import ROOT
from tests.support.refusal import Place, model

NAMES = ("app", "callbacks", "datamodules", "math", "random", "datasets", "torch", "json")
BROKEN = "raise SystemExit('the file of the user was imported')\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    made = Place.at(tmp_path, monkeypatch, capsys)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(BROKEN)
    (tmp_path / "my_rewards.py").write_text("def f(completions, **rest): return [1.0] * len(completions)\n")
    return made


@pytest.mark.slow
def test_the_installed_modules_win_and_the_files_are_named(place: Place) -> None:
    """In the command and in its reward workers, which import a reward of the same folder."""
    reward = {"class_path": "app.rewards.Function", "init_args": {"path": "my_rewards.f"}}
    place.config(lambda config: model(config).update(rewards=[reward]))
    code, said = place.run("fit", "--config", "run.yaml")
    assert code == 0, said[-2000:]
    for name in NAMES:
        assert f"dots: warning: {name}.py in this folder cannot be imported, because " in said
    assert "my_rewards" not in said


@pytest.mark.long
@pytest.mark.slow
def test_the_command_as_a_module(place: Place) -> None:
    """`python -m` puts the folder first, so that only `app.py` itself cannot be helped."""
    (place.path / "app.py").unlink()
    command = [sys.executable, "-c", _AS_A_MODULE, "describe", "--config", "run.yaml"]
    done = subprocess.run(command, cwd=place.path, env={"PATH": "/usr/bin", "ROOT": str(ROOT)}, capture_output=True,
                          text=True, timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "callbacks.py in this folder cannot be imported" in done.stderr


# What `python -m app` does where Dots is installed, with this repository as the installed one.
_AS_A_MODULE = """
import os, runpy, sys
sys.path[:] = [os.getcwd(), *[entry for entry in sys.path if entry], os.environ["ROOT"]]
sys.argv[0] = "dots"
runpy.run_module("app", run_name="__main__", alter_sys=True)
"""


def test_children_find_what_is_installed_first(place: Place) -> None:
    put_user_folder_last()
    entries = import_path().split(":")
    assert entries.index(str(ROOT)) < entries.index(str(place.path))
    assert entries[-1] == str(place.path) == sys.path[-1]


def test_another_folder_takes_the_place_of_the_last_one(
    place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_user_folder_last()
    other = tmp_path_factory.mktemp("other")
    (other / "random").mkdir()
    (other / "random" / "__init__.py").touch()
    (other / "random_notes").mkdir()
    (other / "json").mkdir()  # no module
    monkeypatch.chdir(other)
    put_user_folder_last()
    assert sys.path[-1] == str(other) and str(place.path) not in sys.path
    assert [name for name, _ in hidden_files()] == ["random"]


def test_the_folder_of_dots_keeps_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    before = list(sys.path)
    put_user_folder_last()
    assert sys.path == before
    assert hidden_files() == []
