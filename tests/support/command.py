"""The real command in processes of their own, forked from one that has already imported the heavy libraries.

Importing torch, transformers and Lightning costs more than a short run does. `fresh=True` starts `python -m app` anew
instead: with imports, hash seed and environment of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from app.reporting.curves import read_scalars

ROOT = Path(__file__).parents[2]
QUICK = [
    "--trainer.max_steps=10",
    "--model.mini_batches=1",
    "--trainer.val_check_interval=5",
    "--data.val_size=16",
    "--data.prompts_per_step=8",
    "--model.sampling.max_completion_length=64",
    "--model.val_sampling.max_completion_length=64",
]
DOTS_RR = """\
trainer:
  callbacks:
    - class_path: callbacks.ReferenceRollouts
      init_args: {size: 8, every: 4}
    - class_path: callbacks.RolloutReplay
      init_args: {fresh_fraction: 0.5, capacity: 64}
"""
"""Callbacks for short runs of the published method."""
EVERY_STEP = "--checkpoint.every=1"
_CLOCK = ("time/", "step_time", "tokens_per_second")
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.support.preload"])


@dataclass(frozen=True)
class Done:
    """What a command left: its exit status (negative: the signal that ended it) and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str) -> list[str]:
    """For a process of its own."""
    return [sys.executable, "-m", "app", *arguments]


def dots(
    *arguments: str, cwd: Path = ROOT, path: Path | None = None, timeout: float = 280, fresh: bool = False
) -> Done:
    """`dots ARGUMENTS`, to its end.

    Args:
        path: a folder that is searched for modules too.
        timeout: seconds; then it is killed, with every process that it started.
        fresh: not forked.
    """
    with TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        if fresh:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, path or ROOT)))}
            with out.open("wb") as stdout, err.open("wb") as stderr:
                code = subprocess.run(
                    command(*arguments), cwd=cwd, env=environment, stdout=stdout, stderr=stderr, timeout=timeout
                ).returncode
        else:
            code = _wait(_fork(arguments, cwd, path, out, err), timeout)
        return Done(code, out.read_text(), err.read_text())


def dots_on_ranks(
    ranks: int, *arguments: str, path: Path | None = None, timeout: float = 280, fresh: bool = False
) -> list[Done]:
    """`dots ARGUMENTS` as one run of several processes, started as a cluster would: one `Done` per rank.

    Those that have not ended `timeout` seconds after the start are killed (return code -9).

    Args:
        path: a folder that is searched for modules too.
        fresh: not forked.
    """
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    with TemporaryDirectory() as folder:
        files = [(Path(folder, f"out{rank}"), Path(folder, f"err{rank}")) for rank in range(ranks)]
        start = _start if fresh else _fork
        processes = [
            start(arguments, ROOT, path, *files[rank], address | {"LOCAL_RANK": str(rank)}) for rank in range(ranks)
        ]
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            _kill(process)
        return [
            Done(process.exitcode or 0, out.read_text(), err.read_text())
            for process, (out, err) in zip(processes, files, strict=True)
        ]


def kill_when(sign: Path, *arguments: str, cwd: Path = ROOT, timeout: float = 200) -> None:
    """Starts `dots ARGUMENTS`, and kills it with all its processes as soon as a file is there."""
    process = _fork(arguments, cwd, None, Path(os.devnull), Path(os.devnull))
    deadline = time.monotonic() + timeout
    while not sign.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    _kill(process)
    assert sign.exists(), f"the run ended, or took {timeout} s, without {sign.name}"


def fit_arguments(folder: Path, *more: str, changes: Sequence[tuple[str, str]] = ()) -> list[str]:
    """Ten small steps of DOTS + RR on the quickstart's prompts, runs below `folder`; `changes` as for `overlay`."""
    callbacks = str(overlay(folder, *changes))
    return ["fit", "--config", "configs/quickstart.yaml", "--config", callbacks, *more, *QUICK,
            f"--trainer.logger.save_dir={folder}"]  # fmt: skip


def run_of(folder: Path) -> Path:
    """The run folder of the quickstart below a logger's save_dir."""
    return folder / "quickstart" / "version_0"


def logged(run: Path) -> dict[str, dict[int, float]]:
    """Every scalar of a run folder by name and step, but those of the clock."""
    return {
        tag: dict(zip(steps, values, strict=True))
        for tag, (steps, values) in read_scalars(run).items()
        if not tag.startswith(_CLOCK)
    }


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """The same of the quickstart below `folder`."""
    return logged(run_of(folder))


def last_checkpoint(folder: Path) -> dict:
    return torch.load(run_of(folder) / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_run(found: Path, expected: Path) -> None:
    """The same value of every scalar at every step, and bitwise the same weights at the end."""
    assert scalars(found) == scalars(expected)
    weights, others = last_checkpoint(expected)["state_dict"], last_checkpoint(found)["state_dict"]
    assert list(weights) == list(others)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())


def overlay(folder: Path, *changes: tuple[str, str]) -> Path:
    """`DOTS_RR` with parts of its text replaced, as a config of its own."""
    callbacks = DOTS_RR
    for old, new in changes:
        assert old in callbacks
        callbacks = callbacks.replace(old, new)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"overlay_{len(list(folder.glob('overlay_*')))}.yaml"
    file.write_text(callbacks)
    return file


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def _fork(
    arguments: Sequence[str],
    cwd: Path,
    path: Path | None,
    out: Path,
    err: Path,
    environment: Mapping[str, str] | None = None,
) -> BaseProcess:
    folders = (str(cwd), path and str(path), str(out), str(err))
    process = _FORKS.Process(target=_child, args=(arguments, *folders, dict(environment or {})))
    process.start()
    return process


def _start(
    arguments: Sequence[str], cwd: Path, path: Path | None, out: Path, err: Path, environment: Mapping[str, str]
) -> BaseProcess:
    """As `_fork`, but with imports, hash seed and environment of its own."""
    folders = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, path or ROOT)))}
    process = multiprocessing.get_context("spawn").Process(
        target=_replaced, args=(command(*arguments), str(cwd), str(out), str(err), {**folders, **environment})
    )
    process.start()
    return process


def _replaced(words: Sequence[str], cwd: str, out: str, err: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.execve(words[0], list(words), dict(environment))


def _child(
    arguments: Sequence[str], cwd: str, path: str | None, out: str, err: str, environment: Mapping[str, str]
) -> None:
    os.setsid()
    os.environ.update(environment)
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    sys.path[:0] = [cwd, *([path] if path else [])]
    sys.argv = ["dots", *arguments]
    from app.cli.entry import main

    main()


def _wait(process: BaseProcess, timeout: float) -> int:
    process.join(timeout)
    if process.exitcode is None:
        _kill(process)
        raise subprocess.TimeoutExpired("dots", timeout)
    return process.exitcode


def _kill(process: BaseProcess) -> None:
    """The whole session: reward workers too."""
    assert process.pid is not None
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
