"""Run the real command in this process on a small run: fast enough for a hundred refusals."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from app.cli.entry import main

ROOT = Path(__file__).parents[2]
TINY = ROOT / "configs" / "tiny_policy"
PROMPTS = 8
BASE: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 1,
        "logger": {
            "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
            "init_args": {"save_dir": "runs", "name": "small", "default_hp_metric": False},
        },
        "callbacks": [
            {"class_path": "callbacks.RolloutReplay", "init_args": {"capacity": 8, "admit": "all"}},
            {"class_path": "callbacks.RunCheckpoint", "init_args": {"every": 1}},
        ],
    },
    "model": {
        "class_path": "app.module.GRPOModule",
        "init_args": {
            "policy": {"path": str(TINY)},
            "rewards": [{"class_path": "app.rewards.Numeric"}],
            "sampling": {"num_generations": 2, "max_completion_length": 3},
        },
    },
    "data": {
        "class_path": "datamodules.online.OnlinePromptDataModule",
        "init_args": {
            "prompts_per_step": 2,
            "cache_dir": "cache",
            "selector": {"class_path": "datamodules.selectors.Uniform"},
            "train": {"class_path": "datamodules.prompts.PromptFile", "init_args": {"path": "pool.jsonl"}},
        },
    },
}
Change = Callable[[dict[str, Any]], object]


@dataclass(frozen=True)
class Place:
    """A folder with a config and data for a small run.

    Attributes:
        path: the working folder of the command.
        capture: captures what the command prints.
    """

    path: Path
    capture: pytest.CaptureFixture[str]

    @classmethod
    def at(cls, path: Path, monkeypatch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> Place:
        monkeypatch.chdir(path)
        monkeypatch.setattr("sys.argv", ["dots"])
        # A log handler of Lightning's keeps the stream that pytest captured with when it was made, closed by now.
        monkeypatch.setattr("logging.raiseExceptions", False)
        for name in ("DOTS_DEBUG", "PL_GLOBAL_SEED"):
            monkeypatch.setenv(name, "0")
        write_pool(path / "pool.jsonl")
        place = cls(path, capture)
        place.config(lambda config: None)
        return place

    def config(self, change: Change) -> None:
        """Write `run.yaml`: the small run with a change."""
        config = copy.deepcopy(BASE)
        change(config)
        (self.path / "run.yaml").write_text(yaml.safe_dump(config))

    def run(self, *arguments: str) -> tuple[int, str]:
        """Return exit code and standard error of `dots ARGUMENTS`."""
        code, _, said = self.run_with_output(*arguments)
        return code, said

    def fit(self, folder: str, steps: int, *more: str) -> tuple[Path, dict[str, Any]]:
        """Train `run.yaml` in a folder for so many steps; return the run's folder and its last checkpoint."""
        where = f"--trainer.logger.init_args.save_dir={folder}"
        code, said = self.run("fit", "--config", "run.yaml", where, f"--trainer.max_steps={steps}", *more)
        assert code == 0, said[-2000:]
        run = self.path / folder / "small" / "version_0"
        return run, torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)

    def run_with_output(self, *arguments: str) -> tuple[int, str, str]:
        """Return exit code, standard output and standard error of `dots ARGUMENTS`."""
        self.capture.readouterr()
        code: int | str | None = 0
        try:
            main(list(arguments))
        except SystemExit as stopped:
            code = stopped.code
        assert isinstance(code, int | None)
        said = self.capture.readouterr()
        return code or 0, said.out, said.err

    def refused(self, *arguments: str, touches: bool = False) -> str:
        """Return the one error line of the command. Assert exit code 2 and, unless it `touches` files, no changes."""
        before = files(self.path)
        code, said = self.run(*arguments)
        lines = [line for line in said.splitlines() if line.startswith("dots: error: ")]
        assert code == 2, f"exit {code}: {said[-600:]}"
        assert len(lines) == 1, said[-3000:]
        assert "Traceback" not in said, said[-3000:]
        if not touches:
            after = files(self.path)
            assert after == before, sorted(after.keys() ^ before.keys())
        return lines[0].removeprefix("dots: error: ")


def write_pool(path: Path, rows: Sequence[dict[str, Any]] | None = None) -> None:
    rows = rows or [{"question": f"{i} + 1 =", "answer": str(i + 1)} for i in range(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def files(folder: Path) -> dict[str, bytes | None]:
    """Return the content of every file by name: None for folders, the target for links."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path).encode()
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def model(config: dict[str, Any]) -> dict[str, Any]:
    return config["model"]["init_args"]


def data(config: dict[str, Any]) -> dict[str, Any]:
    return config["data"]["init_args"]


def source(config: dict[str, Any]) -> dict[str, Any]:
    return data(config)["train"]["init_args"]


def callback(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the arguments of a callback by its short name."""
    found = next(one for one in config["trainer"]["callbacks"] if one["class_path"] == f"callbacks.{name}")
    return found.setdefault("init_args", {})
