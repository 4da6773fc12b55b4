"""Runs of a comparison as processes: they end with it, they save first, and there is one comparison in a folder."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from app.studies.compare.process import fit, only_one
from app.studies.compare.runner import run_all
from datamodules.errors import UserError
from tests.support.compare_runs import request

ROOT = Path(__file__).parents[2]
RUN = """
import pathlib, signal, sys, time

def stop(number, frame):
    print("saved", flush=True)
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stop)
print("began with", *sys.argv[1:4], flush=True)
pathlib.Path("began").touch()
time.sleep(float(sys.argv[2]))
sys.exit(int(sys.argv[3]))
"""
COMPARISON = """
import pathlib, sys
sys.path.insert(0, {root!r})
from app.studies.compare.process import fit, only_one
with only_one(pathlib.Path(".")) as lock:
    fit(["600", "0"], pathlib.Path("log.txt"), lock, lambda: None)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which `python -m app` is a stand-in that sleeps and exits as it is told."""
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "__main__.py").write_text(RUN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def await_that(condition: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_ends_with_its_exit_status_and_its_words(folder: Path) -> None:
    with only_one(folder) as lock:
        assert fit(["0", "3"], folder / "log.txt", lock, lambda: None) == 3
        assert fit(["0", "0"], folder / "log.txt", lock, lambda: None) == 0
    assert (folder / "log.txt").read_text() == "began with fit 0 3\nbegan with fit 0 0\n"


def test_a_run_that_fails_is_named_with_its_last_lines(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (folder / "app" / "__main__.py").write_text("print('first')\nprint('out of memory')\nraise SystemExit(3)\n")
    settings = {"trainer": {"max_steps": 4, "val_check_interval": 2}, "model": {"init_args": {}}}
    asked = replace(request("grpo fast", seeds=(0,)), base=())
    with pytest.raises(
        UserError, match=r"arm grpo with seed 0 ended with exit status 3 .*: out of memory \(all output"
    ):
        run_all(asked, folder, {(arm.name, seed): settings for arm, seed in asked.runs()})
    assert "first\nout of memory\n" in capfd.readouterr().err
    assert (folder / "runs" / "grpo" / "seed_0" / "log.txt").read_text() == "first\nout of memory\n"
    assert not (folder / "runs" / "fast").exists()


def test_a_comparison_that_is_stopped_lets_its_run_save(folder: Path) -> None:
    def stop_when_begun() -> None:
        if (folder / "began").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), only_one(folder) as lock:
        fit(["600", "0"], folder / "log.txt", lock, stop_when_begun)
    assert (folder / "log.txt").read_text() == "began with fit 600 0\nsaved\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent is gone")
def test_a_comparison_that_is_killed_lets_its_run_save_and_is_waited_for(folder: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", COMPARISON.format(root=str(ROOT))], cwd=folder)
    await_that((folder / "began").exists)
    with pytest.raises(UserError, match="another dots compare"), only_one(folder, patience_s=0):
        pass
    process.kill()
    process.wait()
    with only_one(folder):  # the run holds the folder until it has ended
        assert (folder / "log.txt").read_text() == "began with fit 600 0\nsaved\n"
